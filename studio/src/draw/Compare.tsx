import { useState } from "react"
import type { GeneratedImage } from "../gen/collage/v1/collage_service_pb"
import { redone, type Version } from "../versions/version"
import { words } from "../words"
import { Drawn } from "./Drawn"

const said = words.results

/** One picture over what it was made from, as far as a slider says. A redo is held against the picture before it. */
export function Compare({ version, image }: { version: Version; image: GeneratedImage }) {
  const [share, setShare] = useState(50)
  const parent = redone(version)?.parent?.source
  const before = parent?.case === "blob" ? parent.value.sha256 : undefined
  const [isParent, setIsParent] = useState(before !== undefined)
  const under = isParent ? before : version.composite
  const { width, height } = version.document.size
  const left = isParent ? said.before : said.composite
  return (
    <div className="compare">
      <div
        className="picture large"
        style={{ aspectRatio: `${width} / ${height}`, "--aspect": width / height } as object}
      >
        <Drawn digest={image.blob?.sha256 ?? ""} alt={said.picture} />
        {under && (
          <div className="under" style={{ clipPath: `inset(0 ${100 - share}% 0 0)` }}>
            <Drawn key={under} digest={under} alt={left} />
          </div>
        )}
        <div className="edge" style={{ left: `${share}%` }} aria-hidden="true" />
        <input
          type="range"
          min={0}
          max={100}
          step={1}
          value={share}
          aria-label={said.compareSlider(left)}
          aria-valuetext={`${share} %`}
          onChange={(event) => setShare(Number(event.target.value))}
        />
      </div>
      <p className="hint compare-names">
        <span>{left}</span>
        <span>{said.picture}</span>
      </p>
      {before && version.composite && (
        <label className="check">
          <input
            type="checkbox"
            checked={!isParent}
            onChange={(event) => setIsParent(!event.target.checked)}
          />
          {said.againstCollage}
        </label>
      )}
    </div>
  )
}
