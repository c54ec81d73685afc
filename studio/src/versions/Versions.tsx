import "./versions.css"
import { useState } from "react"
import { stand } from "../draw/Draw"
import { Drawn } from "../draw/Drawn"
import { openResults } from "../draw/looking"
import { useStudio } from "../store"
import { words } from "../words"
import { useProgress } from "./progress"
import { settings } from "./settings"
import { type Node, tree, type Version } from "./version"
import { pick, useVersions, versionNamed } from "./versions"

const said = words.versions

/** What was drawn, as a tree: each version below the one it came from, with what is different. */
export function Versions() {
  const versions = useVersions((state) => state.versions)
  const [shown, setShown] = useState<string>()
  if (versions.length === 0) return <p className="hint no-versions">{said.none}</p>
  const chosen = versions.find(({ id }) => id === shown)
  return (
    <>
      <ol className="version-tree">
        {tree(versions).map((node) => (
          <VersionRow
            key={node.version.id}
            node={node}
            isShown={node.version.id === shown}
            show={() => setShown(shown === node.version.id ? undefined : node.version.id)}
          />
        ))}
      </ol>
      {chosen && <Settings version={chosen} />}
    </>
  )
}

function VersionRow({ node, isShown, show }: { node: Node; isShown: boolean; show: () => void }) {
  const { version, depth } = node
  const parent = versionNamed(version.parent?.version)
  const progress = useProgress((all) => all.get(version.id))
  const drawn = useStudio(({ document }) => document.drawn)
  const [first = version.parent ? said.same : said.first] = version.changed
  const summary = version.label ?? (version.changed.length > 1 ? version.changed.join(", ") : first)
  return (
    <li style={{ "--depth": depth } as object} aria-label={said.item(version.number, summary)}>
      <div className="version-words">
        <button
          type="button"
          className="link"
          aria-label={`${said.open}: ${said.item(version.number, summary)}`}
          onClick={() => openResults({ version: version.id })}
        >
          {version.number}
        </button>
        {parent && <span className="hint from">{said.from(parent.number)}</span>}
        <span className="hint" title={summary}>
          {version.state === "done" ? summary : stand(version, progress)}
        </span>
        <button
          type="button"
          className="icon small"
          aria-expanded={isShown}
          aria-label={`${said.allSettings}: ${said.item(version.number, summary)}`}
          onClick={show}
        >
          ⋯
        </button>
      </div>
      <div className="thumbnails">
        {version.images.map(({ index, blob }) => {
          const isUsed = drawn?.version === version.id && drawn.index === index
          return (
            <button
              key={index}
              type="button"
              className="thumbnail"
              aria-pressed={isUsed}
              aria-label={said.pick(version.number, index + 1)}
              onClick={() => pick({ version: version.id, index })}
            >
              <Drawn digest={blob?.sha256 ?? ""} alt="" />
            </button>
          )
        })}
      </div>
    </li>
  )
}

function Settings({ version }: { version: Version }) {
  return (
    <dl className="settings" aria-label={said.allSettings}>
      {version.changed.length > 0 && (
        <div>
          <dt>{said.changed}</dt>
          <dd>{version.changed.join(", ")}</dd>
        </div>
      )}
      {settings(version).map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  )
}
