import { useEffect, useState } from "react"
import { Canvas } from "./canvas/Canvas"
import { SelectionTools, Tools, ViewTools } from "./canvas/Tools"
import { useKeys } from "./canvas/useKeys"
import { Draw } from "./draw/Draw"
import { closeResults } from "./draw/looking"
import { Results } from "./draw/Results"
import { Export } from "./export/Export"
import { Inspector } from "./inspector/Inspector"
import { Layers } from "./layers/Layers"
import { ToolSettings } from "./mask/MaskTools"
import { useNarrow } from "./ui/useNarrow"
import { Live, Messages } from "./ui/Voice"
import { Versions } from "./versions/Versions"
import { words } from "./words"

type Tab = keyof typeof words.tabs

/** The page: tools above, layers left, canvas in the middle, settings right, versions below; on narrow screens the canvas and one panel at a time. */
export function App() {
  const isNarrow = useNarrow()
  const [tab, setTab] = useState<Tab>("layers")
  useKeys()
  useEffect(() => {
    document.title = words.title
  }, [])
  return (
    <div className={isNarrow ? "page narrow" : "page"} data-tab={tab}>
      <header className="tools">
        <h1>{words.title}</h1>
        <Tools />
        <Export />
      </header>
      <nav className="panel layers" aria-label={words.regions.layers}>
        <Layers />
      </nav>
      <main className="canvas" aria-label={words.regions.canvas}>
        <Canvas />
        <div className="hand">
          <SelectionTools />
          <ToolSettings />
        </div>
        <ViewTools />
        <Results />
      </main>
      <aside className="panel inspector" aria-label={words.regions.inspector}>
        <Inspector only={isNarrow ? (tab === "layer" ? "layer" : "scene") : undefined} />
      </aside>
      <section className="panel draw" aria-label={words.regions.draw}>
        <Draw />
      </section>
      <section className="panel versions" aria-label={words.regions.versions}>
        <Versions />
      </section>
      {isNarrow && (
        <div className="tabs" role="tablist">
          {(Object.keys(words.tabs) as Tab[]).map((key) => (
            <button
              key={key}
              type="button"
              role="tab"
              aria-selected={tab === key}
              onClick={() => {
                closeResults()
                setTab(key)
              }}
            >
              {words.tabs[key]}
            </button>
          ))}
        </div>
      )}
      <Messages />
      <Live />
    </div>
  )
}
