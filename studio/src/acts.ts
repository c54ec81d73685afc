// What can be done to layers from the keyboard, the tools and the list alike: each a named edit that is also said.

import { newId, type Piece, placement } from "./document"
import * as edits from "./edits"
import { redo, selectedPieces, undo, useStudio } from "./store"
import { say } from "./voice"
import { words } from "./words"

const namesOf = (pieces: readonly Piece[]) => words.names(pieces.map(({ layer }) => layer.name))

/** The selected pieces that may be changed; says so where some are locked. */
function free(): Piece[] {
  const chosen = selectedPieces(useStudio.getState())
  const locked = chosen.filter((piece) => piece.locked)
  if (chosen.length === 0) say(words.said.nothingSelected)
  else if (locked.length > 0) say(words.said.isLocked(namesOf(locked)))
  return chosen.filter((piece) => !piece.locked)
}

export function act(name: string, edit: edits.Edit, merge?: string): void {
  useStudio.getState().change(name, edit, merge)
  say(name)
}

const idsOf = (pieces: readonly Piece[]) => pieces.map(({ id }) => id)

export function nudge(right: number, down: number): void {
  const pieces = free()
  const [first] = pieces
  if (!first) return
  const { change } = useStudio.getState()
  change(
    words.edits.move(namesOf(pieces)),
    edits.moveBy(idsOf(pieces), right, down),
    `nudge ${idsOf(pieces)}`,
  )
  const { document } = useStudio.getState()
  const moved = document.pieces.find(({ id }) => id === first.id)
  if (!moved) return
  const { x, y } = placement(moved.layer, document.size)
  say(words.said.place(moved.layer.name, Math.round(x), Math.round(y)))
}

export function removeSelected(): void {
  const pieces = free()
  if (pieces.length) act(words.edits.remove(namesOf(pieces)), edits.remove(idsOf(pieces)))
}

export function duplicateSelected(): void {
  const pieces = selectedPieces(useStudio.getState())
  if (pieces.length === 0) {
    say(words.said.nothingSelected)
    return
  }
  const ids = idsOf(pieces)
  const copies = new Map(ids.map((id) => [id, newId()]))
  const named = namesOf(pieces)
  act(words.edits.duplicate(named), edits.duplicate(ids, [...copies.values()]))
  useStudio.getState().select([...copies.values()])
}

export function flipSelected(axis: "flipHorizontal" | "flipVertical"): void {
  const pieces = free()
  if (pieces.length) act(words.edits.flip(namesOf(pieces)), edits.flip(idsOf(pieces), axis))
}

export function stepSelected(direction: 1 | -1): void {
  const pieces = selectedPieces(useStudio.getState())
  if (pieces.length) stepPieces(idsOf(pieces), direction)
}

/** One step to the front or the back, and where that is. */
export function stepPieces(ids: readonly string[], direction: 1 | -1): void {
  const { document, change } = useStudio.getState()
  const pieces = document.pieces.filter(({ id }) => ids.includes(id))
  change(words.edits.order(namesOf(pieces)), edits.step(ids, direction))
  sayOrder(ids[0])
}

/** Puts pieces at an index of the order without them, back to front. */
export function putAt(ids: readonly string[], index: number): void {
  const { document, change } = useStudio.getState()
  const pieces = document.pieces.filter(({ id }) => ids.includes(id))
  change(words.edits.order(namesOf(pieces)), edits.reorder(ids, index))
  sayOrder(ids[0])
}

function sayOrder(id: string | undefined): void {
  const { pieces } = useStudio.getState().document
  const index = pieces.findIndex((piece) => piece.id === id)
  const name = pieces[index]?.layer.name
  if (name) say(words.said.order(name, pieces.length - index, pieces.length))
}

/** Hides what shows, or shows what is hidden, of these pieces. */
export function toggleVisible(ids: readonly string[]): void {
  const { pieces } = useStudio.getState().document
  const chosen = pieces.filter(({ id }) => ids.includes(id))
  if (chosen.length === 0) return
  const shows = chosen.some(({ layer }) => layer.visible !== false)
  const name = shows ? words.edits.hide(namesOf(chosen)) : words.edits.show(namesOf(chosen))
  act(name, edits.setLayers(ids, { visible: shows ? false : undefined }))
}

export function toggleLocked(ids: readonly string[]): void {
  const { pieces } = useStudio.getState().document
  const chosen = pieces.filter(({ id }) => ids.includes(id))
  if (chosen.length === 0) return
  const locked = !chosen.every((piece) => piece.locked)
  const name = locked ? words.edits.lock(namesOf(chosen)) : words.edits.unlock(namesOf(chosen))
  act(
    name,
    edits.changePieces(ids, (piece) => ({ ...piece, locked }), { always: true }),
  )
}

/** Groups what is selected, or takes its groups apart where it is one group already. */
export function toggleGroup(): void {
  const pieces = selectedPieces(useStudio.getState())
  if (pieces.length === 0) {
    say(words.said.nothingSelected)
    return
  }
  const [first] = pieces
  const isGroup = first?.group !== undefined && pieces.every(({ group }) => group === first.group)
  if (isGroup) act(words.edits.ungroup(namesOf(pieces)), edits.group(idsOf(pieces), undefined))
  else if (pieces.length > 1)
    act(words.edits.group(namesOf(pieces)), edits.group(idsOf(pieces), newId()))
}

export function selectAll(): void {
  const { document, select } = useStudio.getState()
  select(idsOf(document.pieces.filter((piece) => !piece.locked && piece.layer.visible !== false)))
  saySelection()
}

export function saySelection(): void {
  const pieces = selectedPieces(useStudio.getState())
  say(pieces.length ? words.said.selected(namesOf(pieces)) : words.said.nothingSelected)
}

export function takeBack(): void {
  const edit = undo()
  say(edit === undefined ? words.said.nothingToUndo : words.said.undone(edit))
}

export function doAgain(): void {
  const edit = redo()
  say(edit === undefined ? words.said.nothingToRedo : words.said.redone(edit))
}
