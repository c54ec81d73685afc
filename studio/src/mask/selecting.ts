// "Select object": points say which object of a layer's picture is meant, and the service cuts it out.

import { create as make } from "@bufbuild/protobuf"
import { create } from "zustand"
import { act } from "../acts"
import { type Point, toCanvas, toPicture } from "../canvas/geometry"
import { putDown, useDesk } from "../canvas/view"
import { type Extent, type Piece, pictureOf, placement } from "../document"
import { replacePicture } from "../edits"
import type { Image } from "../gen/collage/v1/blob_pb"
import { type Point as Mark, PointSchema } from "../gen/collage/v1/collage_pb"
import { useModels } from "../models"
import { usePictures } from "../pictures"
import { trouble } from "../server"
import { useStudio } from "../store"
import { say, tell } from "../voice"
import { words } from "../words"
import { cutFrom } from "./cutout"

interface Selecting {
  /** The piece whose object is meant; "" for none. */
  readonly id: string
  /** The picture that the points lie in: the piece's before the first of them. */
  readonly image: Image | undefined
  /** The digest of what stands in its place by now. */
  readonly shown: string
  readonly marks: readonly Mark[]
  /** Those of them that `shown` is the answer to. */
  readonly answered: readonly Mark[]
  /** Whether an answer is waited for. */
  readonly isBusy: boolean
}

const NOTHING = { id: "", image: undefined, shown: "", marks: [], answered: [] }

export const useSelecting = create<Selecting>()(() => ({ ...NOTHING, isBusy: false }))

/** Whether the server has what is told by points. */
export const canSelect = ({ cutOutModels } = useModels.getState()) =>
  cutOutModels.some(({ takesPoints }) => takesPoints)

/** Begins to point at an object of a piece's picture as it is now. */
export function startSelect(piece: Piece): void {
  if (piece.locked) return
  begin(piece)
  useDesk.setState({ tool: "select" })
  say(words.mask.selectHint)
}

// Whoever puts the tool down, or takes another in hand, is done with it.
useDesk.subscribe(({ tool }) => {
  if (tool !== "select" && useSelecting.getState().id) useSelecting.setState(NOTHING)
})

function begin({ id, layer }: Piece): void {
  useSelecting.setState({ ...NOTHING, id, image: layer.image, shown: pictureOf(layer) })
}

/** Where a mark lies on the canvas. */
export function onCanvas(mark: Mark, piece: Piece, canvas: Extent, picture: Extent): Point {
  const at = { x: mark.x * picture.width, y: mark.y * picture.height }
  return toCanvas(at, placement(piece.layer, canvas), picture)
}

/** The mark at a point of the canvas; none beside the picture. */
export function markAt(
  point: Point,
  outside: boolean,
  piece: Piece,
  canvas: Extent,
  picture: Extent,
): Mark | undefined {
  const at = toPicture(point, placement(piece.layer, canvas), picture)
  const x = at.x / picture.width
  const y = at.y / picture.height
  const isWithin = x >= 0 && x <= 1 && y >= 0 && y <= 1
  return isWithin ? make(PointSchema, { x, y, outside }) : undefined
}

/** Says that what lies at a point of the canvas is meant, or is not; what is cut out follows. */
export function pointAt(point: Point, outside: boolean): void {
  const { document } = useStudio.getState()
  const piece = document.pieces.find((each) => each.id === useSelecting.getState().id)
  const pixels = piece && usePictures.getState().pixels.get(pictureOf(piece.layer))
  if (!piece || !pixels) return
  // Undone, painted on, or another picture: what was pointed at was in what is gone.
  if (pictureOf(piece.layer) !== useSelecting.getState().shown) begin(piece)
  const mark = markAt(point, outside, piece, document.size, pixels)
  if (mark) {
    useSelecting.setState(({ marks }) => ({ marks: [...marks, mark] }))
    void cut()
  } else say(words.mask.beside)
}

/** Asks for what all marks mean, one question at a time: marks that come meanwhile are in the next. */
async function cut(): Promise<void> {
  if (useSelecting.getState().isBusy) return
  for (;;) {
    const asked = useSelecting.getState()
    const { id, image, shown, marks, answered } = asked
    if (!image || marks === answered || marks.every(({ outside }) => outside)) break
    useSelecting.setState({ isBusy: true })
    say(words.mask.selecting)
    const found = await cutFrom(image, marks).catch(trouble)
    const piece = useStudio.getState().document.pieces.find((each) => each.id === id)
    // Begun anew meanwhile: this answers what nobody asks any more.
    if (useSelecting.getState().image !== image || useSelecting.getState().shown !== shown) continue
    if (!piece || pictureOf(piece.layer) !== shown) {
      putDown()
    } else if ("sha256" in found) {
      useSelecting.setState({ shown: found.sha256, answered: marks })
      act(words.edits.select(piece.layer.name), replacePicture(id, found))
    } else {
      // What led to nothing is taken back, with what came after it.
      useSelecting.setState({ marks: answered })
      tell(found.message, "error")
    }
  }
  useSelecting.setState({ isBusy: false })
}
