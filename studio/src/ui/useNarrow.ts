import { useSyncExternalStore } from "react"

// Below this width panels stand below the canvas, one at a time.
const query = globalThis.matchMedia?.("(max-width: 899px)")

export function useNarrow(): boolean {
  return useSyncExternalStore(
    (changed) => {
      query.addEventListener("change", changed)
      return () => query.removeEventListener("change", changed)
    },
    () => query.matches,
  )
}
