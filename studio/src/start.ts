// What happens when the page opens: this tab's document is fetched, or the example put up; then every change is saved
// and planned.

import { create } from "zustand"
import { example } from "./art"
import { originalsOf, picturesOf } from "./document"
import { awaitModels, useModels } from "./models"
import { forgetUnused, load } from "./pictures"
import { replan } from "./plan"
import { Autosave, claim, saveSetting, setting } from "./saved"
import { useStudio } from "./store"
import { tell } from "./voice"
import { words } from "./words"

/** This tab's document: "" until it is known. Versions are kept under it. */
export const useTab = create<{ id: string }>()(() => ({ id: "" }))

/** The side of the example where no model has told what it takes: that of the bundled one. */
const FIRST_SIDE = 128
// How long the example waits for the server to say which canvas it likes.
const MODELS_MS = 1500
const VISITED = "visited"

export interface Started {
  /** Whether the document is the example, at somebody's first visit. */
  readonly isFirst: boolean
  /** The document that this tab's is a copy of: it was duplicated. */
  readonly copyOf?: string
}

/** Answers once this tab's document stands. */
export async function start(): Promise<Started> {
  const models = awaitModels()
  const saved = await claim().catch(() => undefined)
  if (!saved) tell(words.status.unsaved, "error")
  const autosave = new Autosave(() => tell(words.status.unsaved, "error"))
  useStudio.subscribe((state, before) => {
    if (state.document === before.document) return
    const used = picturesOf(state.document)
    for (const digest of used) void load(digest)
    forgetUnused(new Set([...used, ...originalsOf(state.document)]))
    if (saved) autosave.save({ id: saved.id, document: state.document, at: Date.now() })
    replan(state.document)
  })
  if (saved?.document) useStudio.getState().restore(saved.document)
  else {
    await Promise.race([models, new Promise((resolve) => setTimeout(resolve, MODELS_MS))])
    const [model] = useModels.getState().models
    const first = await example(model?.nativeSide ?? FIRST_SIDE, model?.drawnControlKinds ?? [])
    useStudio.getState().restore(first)
  }
  useTab.setState({ id: saved?.id ?? "unsaved" })
  const visited = await setting<boolean>(VISITED).catch(() => undefined)
  if (!visited) await saveSetting(VISITED, true).catch(() => undefined)
  return { isFirst: !visited && !saved?.document, copyOf: saved?.copyOf }
}
