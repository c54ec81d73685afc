import { useCallback, useEffect, useRef, useState } from "react"
import { type Document, picturesOf, toCollage } from "../document"
import type { BlobRef } from "../gen/collage/v1/blob_pb"
import type { GeneratedImage } from "../gen/collage/v1/collage_service_pb"
import { addPicture, pictureBlob } from "../pictures"
import { withPictures } from "../plan"
import { isAbort, service, trouble } from "../server"
import { useDocument, useStudio } from "../store"
import type { Version } from "../versions/version"
import { pick } from "../versions/versions"
import { tell } from "../voice"
import { words } from "../words"
import { Area, type Brush, coverage, cut, type Point } from "./area"
import { Count } from "./Count"
import { Drawn } from "./Drawn"
import { closeResults, openResults } from "./looking"
import { drawRedo, redoable } from "./work"

const said = words.redo

/** Layers of a drawn picture to draw again: which, where, and how many options of it. */
export function Redo({ version, image }: { version: Version; image: GeneratedImage }) {
  // What is drawn again stands on this picture, and on the collage as it is now: dials may be turned before.
  const drawn = useStudio((state) => state.document.drawn)
  const isUsed = drawn?.version === version.id && drawn.index === image.index
  const wasPicked = useRef(false)
  useEffect(() => {
    if (isUsed) return
    // Undone while this is open: then it is another picture's turn.
    if (wasPicked.current) closeResults()
    else pick({ version: version.id, index: image.index })
    wasPicked.current = true
  }, [isUsed, version.id, image.index])
  return isUsed ? <RedoOf image={image} /> : null
}

function RedoOf({ image }: { image: GeneratedImage }) {
  const document = useDocument()
  const pieces = redoable(document)
  const [chosen, setChosen] = useState<readonly string[]>(() => {
    const { selection } = useStudio.getState()
    return pieces.filter(({ id }) => selection.includes(id)).map(({ id }) => id)
  })
  const names = pieces.filter(({ id }) => chosen.includes(id)).map(({ layer }) => layer.name)
  const [images, setImages] = useState(1)
  const [restoreCutout, setRestoreCutout] = useState(false)
  const [isAsking, setIsAsking] = useState(false)
  const area = useArea(document, names)
  const submit = async () => {
    setIsAsking(true)
    try {
      const areas = area?.isPainted ? await cutOut(area, image) : undefined
      const layers = areas ? [...areas.keys()] : names
      const redo = { layers, images, restoreCutout, areas }
      const next = layers.length > 0 && (await drawRedo(document, redo))
      if (next) openResults({ version: next.id })
      else tell(said.none, "error")
    } catch (error) {
      tell(trouble(error).message, "error")
    } finally {
      setIsAsking(false)
    }
  }
  return (
    <div className="redo">
      <Painting image={image} area={area} document={document} />
      <div className="redo-form">
        <fieldset>
          <legend>{said.layers}</legend>
          {pieces.toReversed().map(({ id, layer }) => (
            <label key={id} className="check">
              <input
                type="checkbox"
                checked={chosen.includes(id)}
                onChange={(event) =>
                  setChosen(
                    event.target.checked ? [...chosen, id] : chosen.filter((each) => each !== id),
                  )
                }
              />
              {layer.name}
            </label>
          ))}
        </fieldset>
        <label className="check">
          <input
            type="checkbox"
            checked={restoreCutout}
            onChange={(event) => setRestoreCutout(event.target.checked)}
          />
          {said.cutout}
        </label>
        <div className="draw-row">
          <Count count={images} most={8} set={setImages} />
          <button
            type="button"
            className="primary"
            disabled={names.length === 0 || isAsking}
            onClick={() => void submit()}
          >
            {said.draw}
          </button>
        </div>
        <p className="hint">{names.length === 0 ? said.none : said.hint}</p>
      </div>
    </div>
  )
}

/** The area of these layers; undefined until the service has said what is seen of each. */
function useArea(document: Document, names: readonly string[]): Area | undefined {
  const masks = useMasks(document)
  const [area, setArea] = useState<Area>()
  const key = names.join(" ")
  useEffect(() => {
    if (!masks) return
    const chosen = key === "" ? [] : key.split(" ")
    const own = new Map([...masks].filter(([name]) => chosen.includes(name)))
    setArea((before) => new Area(document.size, own, before))
  }, [masks, key, document.size])
  return area
}

function useMasks(document: Document): ReadonlyMap<string, Uint8ClampedArray> | undefined {
  const [masks, setMasks] = useState<ReadonlyMap<string, Uint8ClampedArray>>()
  useEffect(() => {
    const own = new AbortController()
    const ask = async () => {
      const { plan } = await withPictures(picturesOf(document), own.signal, () =>
        service.planCollage(
          { collage: toCollage(document), sampling: document.sampling },
          { signal: own.signal },
        ),
      )
      const found = new Map<string, Uint8ClampedArray>()
      for (const { name, mask } of plan?.layers ?? []) {
        const blob = mask && (await pictureBlob(mask.sha256))
        if (blob) found.set(name, await coverage(blob, document.size))
      }
      if (!own.signal.aborted) setMasks(found)
    }
    ask().catch((error) => {
      if (!own.signal.aborted && !isAbort(error)) tell(trouble(error).message, "error")
    })
    return () => own.abort()
  }, [document])
  return masks
}

/** The picture cut to the area of each layer, stored as layers of their own; without those of which nothing is left. */
async function cutOut(area: Area, image: GeneratedImage): Promise<Map<string, BlobRef>> {
  const areas = new Map<string, BlobRef>()
  const picture = await pictureBlob(image.blob?.sha256 ?? "")
  if (!picture) throw new Error(words.errors.unreachable)
  for (const name of area.masks.keys()) {
    const cover = area.of(name)
    if (!cover.some((value) => value > 0)) continue
    const { ref } = await addPicture(await cut(picture, cover, area.extent))
    areas.set(name, ref)
  }
  return areas
}

const TINT = [232, 62, 140] as const

function Painting(props: { image: GeneratedImage; area: Area | undefined; document: Document }) {
  const { image, area, document } = props
  const { width, height } = document.size
  const [brush, setBrush] = useState<Brush>("widen")
  const [size, setSize] = useState(Math.round(Math.min(width, height) / 10))
  const [at, setAt] = useState<Point>()
  const canvas = useRef<HTMLCanvasElement>(null)
  const last = useRef<Point>(undefined)
  const show = useCallback(() => {
    const context = canvas.current?.getContext("2d")
    if (!context || !area) return
    const tint = context.createImageData(width, height)
    area.whole().forEach((cover, index) => {
      tint.data.set([...TINT, cover * 0.55], 4 * index)
    })
    context.putImageData(tint, 0, 0)
  }, [area, width, height])
  useEffect(show, [show])
  const paint = (to: Point, pressure = 1) => {
    area?.stroke(last.current ?? to, to, (size / 2) * pressure, brush)
    last.current = to
    show()
  }
  const point = (event: React.PointerEvent): Point => {
    const box = event.currentTarget.getBoundingClientRect()
    return {
      x: ((event.clientX - box.left) / box.width) * width,
      y: ((event.clientY - box.top) / box.height) * height,
    }
  }
  const press = (event: React.PointerEvent) =>
    event.pointerType === "pen" ? 0.3 + 1.2 * event.pressure : 1
  const keys = (event: React.KeyboardEvent) => {
    const step = event.shiftKey ? 1 : Math.max(1, size / 2)
    const moves: Record<string, Point> = {
      ArrowLeft: { x: -step, y: 0 },
      ArrowRight: { x: step, y: 0 },
      ArrowUp: { x: 0, y: -step },
      ArrowDown: { x: 0, y: step },
    }
    const from = at ?? { x: width / 2, y: height / 2 }
    const move = moves[event.key]
    if (move) {
      setAt({
        x: Math.min(Math.max(from.x + move.x, 0), width),
        y: Math.min(Math.max(from.y + move.y, 0), height),
      })
    } else if (event.key === "Enter" || event.key === " ") {
      last.current = undefined
      setAt(from)
      paint(from)
      last.current = undefined
    } else return
    event.preventDefault()
    event.stopPropagation()
  }
  return (
    <div className="painting">
      <div
        className="picture large"
        style={{ aspectRatio: `${width} / ${height}`, "--aspect": width / height } as object}
      >
        <Drawn digest={image.blob?.sha256 ?? ""} alt="" />
        {/* biome-ignore lint/a11y/noInteractiveElementToNoninteractiveRole: a surface to paint on is a widget of its own */}
        <canvas
          ref={canvas}
          data-ready={area ? "" : undefined}
          width={width}
          height={height}
          role="application"
          aria-label={said.area}
          tabIndex={0}
          onKeyDown={keys}
          onBlur={() => setAt(undefined)}
          onPointerDown={(event) => {
            event.currentTarget.setPointerCapture(event.pointerId)
            last.current = undefined
            paint(point(event), press(event))
          }}
          onPointerMove={(event) => {
            if (event.buttons & 1) paint(point(event), press(event))
          }}
        />
        {at && (
          <div
            className="brush"
            style={{
              left: `${(100 * at.x) / width}%`,
              top: `${(100 * at.y) / height}%`,
              width: `${(100 * size) / width}%`,
            }}
          />
        )}
      </div>
      <div className="draw-row brushes" role="toolbar" aria-label={said.brush}>
        {(["widen", "narrow"] as const).map((kind) => (
          <button
            key={kind}
            type="button"
            className="plain"
            aria-pressed={brush === kind}
            onClick={() => setBrush(kind)}
          >
            {said[kind]}
          </button>
        ))}
        <label className="check">
          {said.size}
          <input
            type="range"
            min={2}
            max={Math.round(Math.min(width, height) / 2)}
            value={size}
            onChange={(event) => setSize(Number(event.target.value))}
          />
        </label>
        <button
          type="button"
          className="plain"
          onClick={() => {
            area?.reset()
            show()
          }}
        >
          {said.reset}
        </button>
      </div>
    </div>
  )
}
