import { create } from "@bufbuild/protobuf"
import { expect, it } from "vitest"
import { emptyDocument, type Piece } from "../document"
import { addPiece } from "../edits"
import { CutOutModelSchema } from "../gen/collage/v1/collage_pb"
import { canSelect, markAt, onCanvas } from "./selecting"

const canvas = { width: 64, height: 64 }
const picture = { width: 8, height: 4 }
const ref = {
  $typeName: "collage.v1.BlobRef" as const,
  sha256: "a".repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
}

function turned(): Piece {
  const { pieces } = addPiece(ref, picture, { text: "a", id: "a" })(emptyDocument(canvas))
  const [piece] = pieces as [Piece]
  const transform = {
    $typeName: "collage.v1.Transform" as const,
    x: 32,
    y: 32,
    scale: 2,
    rotation: 90,
    flipHorizontal: true,
    flipVertical: false,
  }
  return { ...piece, layer: { ...piece.layer, transform } }
}

it("a mark lies in the picture as it was before it was placed, turned and flipped", () => {
  const piece = turned()
  const middle = markAt({ x: 32, y: 32 }, false, piece, canvas, picture)
  expect([middle?.x, middle?.y, middle?.outside]).toEqual([0.5, 0.5, false])
  // Two pixels of the picture to its right: flipped to the left, which the turn makes upwards.
  const right = markAt({ x: 32, y: 28 }, true, piece, canvas, picture)
  expect(right?.x).toBeCloseTo(0.75)
  expect(right?.y).toBeCloseTo(0.5)
  expect(right?.outside).toBe(true)
  if (!right) throw new Error("no mark")
  expect(onCanvas(right, piece, canvas, picture).y).toBeCloseTo(28)
  expect(markAt({ x: 32, y: 41 }, false, piece, canvas, picture)).toBeUndefined()
})

it("is offered where a model takes points", () => {
  const named = (takesPoints: boolean) => create(CutOutModelSchema, { name: "x", takesPoints })
  expect(canSelect({ models: [], cutOutModels: [named(false)] })).toBe(false)
  expect(canSelect({ models: [], cutOutModels: [named(false), named(true)] })).toBe(true)
})
