import { useSyncExternalStore } from "react"

// What is drawn on a canvas takes its colours from the style sheet's tokens, too.
const query = globalThis.matchMedia?.("(prefers-color-scheme: dark)")
const names = ["accent", "accent-ink", "ground", "surface", "line", "line-strong"] as const

export type Colours = Record<(typeof names)[number], string>

let known: Colours | undefined

function read(): Colours {
  if (!known) {
    const style = getComputedStyle(document.documentElement)
    known = Object.fromEntries(
      names.map((name) => [name, style.getPropertyValue(`--${name}`).trim() || "#888"]),
    ) as Colours
  }
  return known
}

export function useColours(): Colours {
  return useSyncExternalStore((changed) => {
    const again = () => {
      known = undefined
      changed()
    }
    query.addEventListener("change", again)
    return () => query.removeEventListener("change", again)
  }, read)
}
