// What of the drawn is looked at: one version (or its sweep), in one of several ways, in place of the canvas; and which
// picture lies over the collage on the canvas.

import { create } from "zustand"
import type { Option } from "../document"
import { blobUrl } from "../server"
import { useStudio } from "../store"
import { useProgress } from "../versions/progress"
import { imageOf, useVersions } from "../versions/versions"
import { useShown } from "./shown"

export type View = "side" | "compare" | "redo" | "sweep"

export interface Results {
  /** The version looked at; undefined: the canvas is seen. */
  readonly version?: string
  /** The option looked at closely. */
  readonly index: number
  readonly view: View
  /** Whether the picked picture lies over the collage on the canvas. */
  readonly isOver: boolean
}

export const useResults = create<Results>()(() => ({ index: 0, view: "side", isOver: true }))

export function openResults({ version, index = 0 }: { version: string; index?: number }): void {
  useResults.setState({ version, index, view: "side" })
}

export function closeResults(): void {
  useResults.setState({ version: undefined, view: "side" })
}

export function look(view: View, option?: Option): void {
  useResults.setState({ view, ...(option && { version: option.version, index: option.index }) })
}

/** Keeps `useShown` what it should be: what is being drawn, else the picked picture until the next edit. */
export function showOnCanvas(): void {
  const refresh = () => {
    const next = shownNow()
    const { picture, kind } = useShown.getState()
    if (next.picture !== picture || next.kind !== kind) useShown.setState(next)
  }
  useStudio.subscribe((state, before) => {
    if (state.document === before.document) return
    // An edit is of the collage, so that is seen; a pick shows what was picked.
    const isPick = state.document.drawn !== before.document.drawn
    useResults.setState({ isOver: isPick })
    refresh()
  })
  useResults.subscribe(refresh)
  useProgress.subscribe(refresh)
  useVersions.subscribe(refresh)
  refresh()
}

function shownNow(): { picture: string | undefined; kind: "preview" | "result" } {
  const progress = [...useProgress.getState().values()].at(-1)
  const preview = progress && [...progress.previews.values()][0]
  if (preview) return { picture: preview, kind: "preview" }
  const image = imageOf(useStudio.getState().document.drawn)
  const isOver = useResults.getState().isOver && image?.blob
  return { picture: isOver ? blobUrl(image.blob?.sha256 ?? "") : undefined, kind: "result" }
}
