// The rectangle that a layer's picture is cropped to, in the picture's own pixels.

import { create } from "zustand"
import { act } from "../acts"
import { type Box, toCanvas } from "../canvas/geometry"
import { putDown, useDesk } from "../canvas/view"
import { type Extent, type Piece, type Placement, pictureOf, placement } from "../document"
import { changePieces, place, replacePicture } from "../edits"
import { addPicture, load, usePictures } from "../pictures"
import { useStudio } from "../store"
import { words } from "../words"
import { surface, toPng } from "./surface"

interface Cropping {
  /** The piece that is cropped; "" for none. */
  readonly id: string
  readonly box: Box
}

export const useCropping = create<Cropping>()(() => ({
  id: "",
  box: { left: 0, top: 0, right: 0, bottom: 0 },
}))

/** Begins to crop a piece: its whole picture at first. */
export function startCrop(piece: Piece): void {
  const pixels = usePictures.getState().pixels.get(pictureOf(piece.layer))
  if (!pixels || piece.locked) return
  const box = { left: 0, top: 0, right: pixels.width, bottom: pixels.height }
  useCropping.setState({ id: piece.id, box })
  useDesk.setState({ tool: "crop" })
}

// Whoever puts the tool down, or takes another in hand, is done with it.
useDesk.subscribe(({ tool }) => {
  if (tool !== "crop" && useCropping.getState().id) useCropping.setState({ id: "" })
})

/** A box of whole pixels within the picture, of one pixel at least. */
export function within(box: Box, { width, height }: Extent): Box {
  const left = Math.min(Math.max(Math.round(box.left), 0), width - 1)
  const top = Math.min(Math.max(Math.round(box.top), 0), height - 1)
  return {
    left,
    top,
    right: Math.min(Math.max(Math.round(box.right), left + 1), width),
    bottom: Math.min(Math.max(Math.round(box.bottom), top + 1), height),
  }
}

/** Where the centre of what is kept lies on the canvas. */
export function cropped(box: Box, at: Placement, picture: Extent): { x: number; y: number } {
  const centre = { x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2 }
  return toCanvas(centre, at, picture)
}

export async function applyCrop(): Promise<void> {
  const { id, box } = useCropping.getState()
  const { document } = useStudio.getState()
  const piece = document.pieces.find((each) => each.id === id)
  const pixels = piece && usePictures.getState().pixels.get(pictureOf(piece.layer))
  putDown()
  if (!piece || !pixels) return
  const { left, top, right, bottom } = box
  if (left === 0 && top === 0 && right === pixels.width && bottom === pixels.height) return
  const cut = async (digest: string) => {
    await load(digest)
    const source = usePictures.getState().pixels.get(digest)
    if (source?.width !== pixels.width || source.height !== pixels.height) return undefined
    const context = surface(right - left, bottom - top)
    context.drawImage(source.levels[0] as CanvasImageSource, -left, -top)
    return (await addPicture(await toPng(context.canvas))).ref
  }
  const ref = await cut(pictureOf(piece.layer))
  const original = piece.original && (await cut(piece.original.sha256))
  if (!ref) return
  const at = placement(piece.layer, document.size)
  act(words.edits.crop(piece.layer.name), (before) => {
    const replaced = replacePicture(id, ref)(before)
    const kept = changePieces([id], (each) => ({ ...each, original }))(replaced)
    return place(id, cropped(box, at, pixels))(kept)
  })
}
