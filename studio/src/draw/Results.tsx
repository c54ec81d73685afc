import "./results.css"
import { useEffect, useRef } from "react"
import type { Option } from "../document"
import { useStudio } from "../store"
import { useProgress } from "../versions/progress"
import { options, together, type Version } from "../versions/version"
import { imageOf, pick, useVersions } from "../versions/versions"
import { askAgain } from "../versions/watch"
import { say } from "../voice"
import { words } from "../words"
import { Compare } from "./Compare"
import { stand } from "./Draw"
import { Drawn } from "./Drawn"
import { closeResults, look, useResults, type View } from "./looking"
import { Redo } from "./Redo"
import { Sweep } from "./Sweep"

const said = words.results

/** What was drawn, in place of the canvas: options side by side, one against the collage, parts to redo, a sweep. */
export function Results() {
  const { version: id, index, view } = useResults()
  const versions = useVersions((state) => state.versions)
  const version = versions.find((candidate) => candidate.id === id)
  const heading = useRef<HTMLHeadingElement>(null)
  // What was pressed is gone with the view before; keys and screen readers go on from the heading.
  // biome-ignore lint/correctness/useExhaustiveDependencies: after each change of the view
  useEffect(() => {
    if (id) heading.current?.focus()
  }, [id, view])
  if (!version) return <Over />
  const option = { version: version.id, index }
  const image = imageOf(option)
  const go = (next: View) => () => look(next, option)
  return (
    <section
      className="results"
      aria-label={words.regions.results}
      onKeyDown={(event) => {
        if (event.key !== "Escape") return
        event.stopPropagation()
        if (view === "side") closeResults()
        else look("side")
      }}
    >
      <header className="results-head">
        <h2 ref={heading} tabIndex={-1}>
          {version.sweep ? said.sweep : said.title(version.number)}
        </h2>
        <div className="views" role="toolbar" aria-label={words.regions.results}>
          <Switch is={view === "side"} go={go("side")} text={said.side} />
          <Switch is={view === "compare"} go={go("compare")} text={said.compare} off={!image} />
          <Switch is={view === "redo"} go={go("redo")} text={said.redo} off={!image} />
          <Switch is={view === "sweep"} go={go("sweep")} text={said.sweeping} />
        </div>
        <button type="button" className="plain" onClick={closeResults}>
          {said.close}
        </button>
      </header>
      {view === "side" && <SideBySide versions={together(versions, version)} chosen={option} />}
      {view === "compare" && image && <Compare version={version} image={image} />}
      {view === "redo" && image && (
        <Redo key={`${version.id} ${index}`} version={version} image={image} />
      )}
      {view === "sweep" && <Sweep />}
    </section>
  )
}

/** Whether the canvas shows the collage or the picked picture over it. */
function Over() {
  const drawn = useStudio(({ document }) => document.drawn)
  const isOver = useResults((state) => state.isOver)
  useVersions((state) => state.versions)
  if (!imageOf(drawn)) return null
  const show = (next: boolean) => () => useResults.setState({ isOver: next })
  return (
    <div className="over" role="toolbar" aria-label={said.show}>
      <Switch is={!isOver} go={show(false)} text={said.composite} />
      <Switch is={isOver} go={show(true)} text={said.picture} />
    </div>
  )
}

function Switch(props: { is: boolean; go: () => void; text: string; off?: boolean }) {
  return (
    <button
      type="button"
      className="plain"
      aria-pressed={props.is}
      disabled={props.off}
      onClick={props.go}
    >
      {props.text}
    </button>
  )
}

function SideBySide({ versions, chosen }: { versions: readonly Version[]; chosen: Option }) {
  const all = versions.flatMap((version) =>
    Array.from({ length: options(version) }, (_, index) => ({ version, index })),
  )
  return (
    <ul className="options" data-count={Math.min(all.length, 4)}>
      {all.map(({ version, index }) => (
        <OptionTile
          key={`${version.id} ${index}`}
          version={version}
          index={index}
          isChosen={version.id === chosen.version && index === chosen.index}
        />
      ))}
    </ul>
  )
}

function OptionTile(props: { version: Version; index: number; isChosen: boolean }) {
  const { version, index, isChosen } = props
  const progress = useProgress((all) => all.get(version.id))
  const isUsed = useStudio(
    ({ document: { drawn } }) => drawn?.version === version.id && drawn.index === index,
  )
  const image = imageOf({ version: version.id, index })
  const name = words.results.option(version.number, index + 1)
  const preview = progress?.previews.get(index)
  const use = () => {
    pick({ version: version.id, index })
    say(words.versions.pick(version.number, index + 1))
    closeResults()
  }
  const { width, height } = version.document.size
  return (
    <li className={isChosen ? "looked-at" : undefined}>
      <figure style={{ "--aspect": width / height } as object}>
        <div className="picture" style={{ aspectRatio: `${width} / ${height}` }}>
          {image?.blob ? (
            <Drawn digest={image.blob.sha256} alt={name} />
          ) : preview ? (
            <img src={preview} alt={`${name}: ${stand(version, progress)}`} />
          ) : (
            <span className="hint">{stand(version, progress)}</span>
          )}
          {!image && (version.state === "failed" || version.state === "cancelled") && (
            <button type="button" className="plain" onClick={() => void askAgain(version.id)}>
              {words.draw.again}
            </button>
          )}
        </div>
        <figcaption>
          <span>{version.label ?? index + 1}</span>
          <button
            type="button"
            className={isUsed ? "plain" : "primary"}
            disabled={!image}
            aria-label={`${isUsed ? said.used : said.use}: ${name}`}
            onClick={use}
          >
            {isUsed ? said.used : said.use}
          </button>
          <button
            type="button"
            className="plain"
            disabled={!image}
            aria-label={`${said.compare}: ${name}`}
            onClick={() => look("compare", { version: version.id, index })}
          >
            {said.compare}
          </button>
          <button
            type="button"
            className="plain"
            disabled={!image}
            aria-label={`${said.redo}: ${name}`}
            onClick={() => look("redo", { version: version.id, index })}
          >
            {said.redo}
          </button>
        </figcaption>
      </figure>
    </li>
  )
}
