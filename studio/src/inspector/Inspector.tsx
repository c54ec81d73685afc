import { useDesk } from "../canvas/view"
import { useStudio } from "../store"
import { words } from "../words"
import { LayerPanel } from "./LayerPanel"
import { Scene } from "./Scene"

const TABS = ["scene", "layer"] as const

/** Settings of the scene, or of what is selected. `only`: the one that the page's own tabs chose. */
export function Inspector({ only }: { only?: (typeof TABS)[number] }) {
  const tab = useDesk((desk) => desk.tab)
  const count = useStudio((state) => state.selection.length)
  const shown = only ?? tab
  return (
    <>
      {!only && (
        <div className="strip" role="tablist" aria-label={words.regions.inspector}>
          {TABS.map((key) => (
            <button
              key={key}
              type="button"
              role="tab"
              id={`tab-${key}`}
              aria-selected={shown === key}
              aria-controls="settings"
              tabIndex={shown === key ? 0 : -1}
              onClick={() => useDesk.setState({ tab: key })}
              onKeyDown={(event) => {
                if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return
                const next = key === "scene" ? "layer" : "scene"
                useDesk.setState({ tab: next })
                document.getElementById(`tab-${next}`)?.focus()
              }}
            >
              {key === "layer" && count > 1 ? words.inspector.several(count) : words.tabs[key]}
            </button>
          ))}
        </div>
      )}
      <div id="settings" className="inspect" role="tabpanel" aria-label={words.tabs[shown]}>
        {shown === "scene" ? <Scene /> : <LayerPanel />}
      </div>
    </>
  )
}
