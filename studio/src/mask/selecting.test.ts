import { create } from "@bufbuild/protobuf"
import { beforeEach, expect, it, vi } from "vitest"
import { takeBack } from "../acts"
import { useDesk } from "../canvas/view"
import { emptyDocument, type Piece, pictureOf } from "../document"
import { addPiece } from "../edits"
import type { BlobRef } from "../gen/collage/v1/blob_pb"
import { CutOutModelSchema } from "../gen/collage/v1/collage_pb"
import { usePictures } from "../pictures"
import { useStudio } from "../store"
import { canSelect, markAt, onCanvas, pointAt, startSelect, useSelecting } from "./selecting"

type Answer = { found: (ref: BlobRef) => void; failed: (reason: unknown) => void }
// The service's side of each question, in their order: how many points it had, and how to answer it.
const asked: (Answer & { points: number })[] = []
vi.mock("./cutout", () => ({
  cutFrom: (_: unknown, points: readonly unknown[]) =>
    new Promise<BlobRef>((found, failed) => asked.push({ points: points.length, found, failed })),
}))

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

/** A picture of the service's, by a letter. */
const answer = (letter: string): BlobRef => ({ ...ref, sha256: letter.repeat(64) })
const soon = () => new Promise((done) => setTimeout(done))
const shown = () => pictureOf((useStudio.getState().document.pieces[0] as Piece).layer)

beforeEach(() => {
  asked.length = 0
  const document = addPiece(ref, picture, { text: "a", id: "a" })(emptyDocument(canvas))
  useStudio.setState({ document, selection: ["a"] })
  const pixels = {
    width: 8,
    height: 4,
    levels: [],
    alpha: { width: 0, height: 0, data: new Uint8Array() },
  }
  usePictures.setState({
    pixels: new Map(["a", "b", "c"].map((letter) => [letter.repeat(64), pixels])),
  })
  startSelect(document.pieces[0] as Piece)
})

it("asks one question at a time; what is pointed at meanwhile is in the next", async () => {
  pointAt({ x: 32, y: 32 }, false)
  pointAt({ x: 33, y: 32 }, true)
  pointAt({ x: 34, y: 32 }, false)
  expect(asked.map(({ points }) => points)).toEqual([1])
  asked[0]?.found(answer("b"))
  await soon()
  expect(shown()).toBe("b".repeat(64))
  expect(asked.map(({ points }) => points)).toEqual([1, 3])
  asked[1]?.found(answer("c"))
  await soon()
  expect(shown()).toBe("c".repeat(64))
  expect(useSelecting.getState().isBusy).toBe(false)
  expect(asked.length).toBe(2)
})

it("takes back the points that led to nothing", async () => {
  pointAt({ x: 32, y: 32 }, false)
  asked[0]?.found(answer("b"))
  await soon()
  pointAt({ x: 33, y: 32 }, true)
  asked[1]?.failed(new Error("nothing there"))
  await soon()
  expect(useSelecting.getState().marks.length).toBe(1)
  expect(shown()).toBe("b".repeat(64))
})

it("points anew once what it led to was undone", async () => {
  pointAt({ x: 32, y: 32 }, false)
  asked[0]?.found(answer("b"))
  await soon()
  takeBack()
  expect(shown()).toBe("a".repeat(64))
  pointAt({ x: 33, y: 32 }, false)
  expect(asked.map(({ points }) => points)).toEqual([1, 1])
  asked[1]?.found(answer("c"))
  await soon()
  expect(shown()).toBe("c".repeat(64))
})

it("forgets an answer once the tool is put down", async () => {
  pointAt({ x: 32, y: 32 }, false)
  useDesk.setState({ tool: "eraser" })
  expect(useSelecting.getState().marks).toEqual([])
  asked[0]?.found(answer("b"))
  await soon()
  expect(shown()).toBe("a".repeat(64))
  expect(useSelecting.getState().isBusy).toBe(false)
})
