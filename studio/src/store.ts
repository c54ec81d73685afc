// The page's state: the document with its undo, and what is selected. Drag and type through `change`; never set the
// document otherwise, so that every edit has a name and can be undone.

import { type TemporalState, temporal } from "zundo"
import { create, useStore } from "zustand"
import { type Document, emptyDocument, type Piece } from "./document"
import type { Edit } from "./edits"

interface Undoable {
  readonly document: Document
  /** What made this document out of the one before, in words: what undo will take back. */
  readonly edit: string
}

export interface Studio extends Undoable {
  /** Ids of pieces, in the order they were chosen. */
  readonly selection: readonly string[]
  /**
   * One edit.
   *
   * name: in words, for undo and for who listens.
   * merge: edits with one key that follow one another closely are one step of undo (a slider dragged, a word typed).
   */
  change(name: string, edit: Edit, merge?: string): void
  /** Selects these pieces, with all that are grouped with them. */
  select(ids: readonly string[]): void
  /** Another document in place of this one, without undo: what was saved, at start. */
  restore(document: Document): void
}

// A pause longer than this begins a new step of undo.
const PAUSE_MS = 1200
// Steps of undo that are kept.
const STEPS = 500

let lastKey: string | undefined
let lastTime = 0

export const useStudio = create<Studio>()(
  temporal(
    (set, get) => ({
      document: emptyDocument({ width: 512, height: 512 }),
      edit: "",
      selection: [],
      change(name, edit, merge) {
        const document = edit(get().document)
        if (document === get().document) return
        const now = performance.now()
        const continues = merge !== undefined && merge === lastKey && now - lastTime < PAUSE_MS
        lastKey = merge
        lastTime = now
        const history = useStudio.temporal.getState()
        if (continues) history.pause()
        const selection = present(document, get().selection)
        set({ document, edit: name, selection })
        if (continues) history.resume()
      },
      select(ids) {
        lastKey = undefined
        const { pieces } = get().document
        const groups = new Set(
          pieces
            .filter((piece) => ids.includes(piece.id) && piece.group)
            .map((piece) => piece.group),
        )
        const grouped = pieces
          .filter((piece) => groups.has(piece.group) && !ids.includes(piece.id))
          .map((piece) => piece.id)
        set({ selection: [...present(get().document, ids), ...grouped] })
      },
      restore(document) {
        lastKey = undefined
        const history = useStudio.temporal.getState()
        history.pause()
        set({ document, edit: "", selection: [] })
        history.clear()
        history.resume()
      },
    }),
    {
      limit: STEPS,
      partialize: ({ document, edit }): Undoable => ({ document, edit }),
      equality: (past, current) => past.document === current.document,
    },
  ),
)

function present(document: Document, ids: readonly string[]): string[] {
  return ids.filter((id) => document.pieces.some((piece) => piece.id === id))
}

/** Takes the last edit back. Answers its name; undefined where there is none. */
export function undo(): string | undefined {
  const history = useStudio.temporal.getState()
  if (history.pastStates.length === 0) return undefined
  const { edit } = useStudio.getState()
  history.undo()
  settle()
  return edit
}

/** Does again what undo took back. Answers its name; undefined where there is none. */
export function redo(): string | undefined {
  const history = useStudio.temporal.getState()
  if (history.futureStates.length === 0) return undefined
  history.redo()
  settle()
  return useStudio.getState().edit
}

function settle(): void {
  lastKey = undefined
  const { document, selection } = useStudio.getState()
  useStudio.setState({ selection: present(document, selection) })
}

export function useHistory<T>(selector: (state: TemporalState<Undoable>) => T): T {
  return useStore(useStudio.temporal, selector)
}

export const useDocument = (): Document => useStudio((state) => state.document)

export function selectedPieces({ document, selection }: Studio): Piece[] {
  return document.pieces.filter((piece) => selection.includes(piece.id))
}
