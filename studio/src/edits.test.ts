import { describe, expect, it } from "vitest"
import { type Document, emptyDocument, placement } from "./document"
import * as edits from "./edits"
import type { BlobRef } from "./gen/collage/v1/blob_pb"

const picture: BlobRef = {
  $typeName: "collage.v1.BlobRef",
  sha256: "a".repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
}

function collage(...texts: string[]): Document {
  return texts.reduce(
    (document, text) =>
      edits.addPiece(picture, { width: 64, height: 64 }, { text, id: text })(document),
    emptyDocument({ width: 128, height: 128 }),
  )
}

const names = (document: Document) => document.pieces.map(({ layer }) => layer.name)
const ids = (document: Document) => document.pieces.map(({ id }) => id)

describe("words", () => {
  it.each([
    ["cake", [], "cake"],
    ["cake", ["cake"], "cake-2"],
    ["cake-2", ["cake", "cake-2"], "cake-3"],
    ["crème brûlée!", [], "creme-brulee"],
    ["寿司", [], "layer"],
    ["x".repeat(300), [], "x".repeat(60)],
  ])("%s beside %j is named %s", (text, taken, name) => {
    expect(edits.layerName(text, taken)).toBe(name)
  })

  it.each([
    ["IMG_2041 birthday-cake.png", "birthday cake"],
    ["tea_pot.v2.JPEG", "tea pot v2"],
    ["photo (1).webp", "photo"],
    ["a cup", "a cup"],
  ])("the file %s shows %s", (file, text) => {
    expect(edits.textOfFile(file)).toBe(text)
  })

  it.each([
    ["a {box}, {cake} and a {cup} on a table", "cake", "a {box} and a {cup} on a table"],
    ["a {box}, {cake} and a {cup} on a table", "cup", "a {box}, {cake} on a table"],
    ["a {box}, {cake} and a {cup} on a table", "box", "{cake} and a {cup} on a table"],
    ["an {cake}", "cake", ""],
  ])("%s without %s", (prompt, name, without) => {
    expect(edits.withoutMention(prompt, name)).toBe(without)
  })
})

describe("pieces", () => {
  it("are added in front, named, mentioned and fitted", () => {
    const document = collage("cake", "orange", "cake")
    expect(names(document)).toEqual(["cake", "orange", "cake-2"])
    expect(document.prompt).toBe("a {cake}, an {orange}, a {cake-2}")
    expect(document.pieces[0]?.layer.transform?.scale).toBe(1)
  })

  it("take their mention with them, but not when locked", () => {
    const document = edits.changePieces(["b"], (piece) => ({ ...piece, locked: true }))(
      collage("a", "b", "c"),
    )
    const after = edits.remove(["a", "b"])(document)
    expect(ids(after)).toEqual(["b", "c"])
    expect(after.prompt).toBe("a {b}, a {c}")
  })

  it("are renamed wherever they are spoken of", () => {
    const document = edits.rename("a", "b")(collage("a", "b"))
    expect(names(document)).toEqual(["b-2", "b"])
    expect(document.prompt).toBe("an {b-2}, a {b}")
  })

  it("go one step at a time, together", () => {
    const document = collage("a", "b", "c", "d")
    expect(ids(edits.step(["a"], 1)(document))).toEqual(["b", "a", "c", "d"])
    expect(ids(edits.step(["a", "b"], 1)(document))).toEqual(["c", "a", "b", "d"])
    expect(ids(edits.step(["d"], 1)(document))).toEqual(["a", "b", "c", "d"])
    expect(ids(edits.step(["c"], -1)(document))).toEqual(["a", "c", "b", "d"])
    expect(ids(edits.step(["a"], -1)(document))).toEqual(["a", "b", "c", "d"])
    expect(ids(edits.reorder(["d"], 0)(document))).toEqual(["d", "a", "b", "c"])
  })

  it("are mirrored as the eye sees it", () => {
    const turned = edits.place("a", { rotation: 30 })(collage("a"))
    const at = placement(edits.flip(["a"], "flipHorizontal")(turned).pieces[0]!.layer, turned.size)
    expect(at).toMatchObject({ flipHorizontal: true, flipVertical: false, rotation: -30 })
  })

  it("keep their place in the picture on another canvas, locked or not", () => {
    const document = edits.changePieces(["a"], (piece) => ({ ...piece, locked: true }))(
      edits.place("a", { x: 32, y: 96, scale: 0.5 })(collage("a")),
    )
    const wide = edits.resize({ width: 512, height: 256 })(document)
    expect(placement(wide.pieces[0]!.layer, wide.size)).toMatchObject({ x: 192, y: 192, scale: 1 })
    expect(wide.pieces[0]!.locked).toBe(true)
  })

  it("are copied with a name and a group of their own", () => {
    const document = edits.group(["a", "b"], "g")(collage("a", "b"))
    const after = edits.duplicate(["a", "b"], ["c", "d"])(document)
    expect(ids(after)).toEqual(["a", "c", "b", "d"])
    expect(names(after)).toEqual(["a", "a-2", "b", "b-2"])
    const groups = after.pieces.map((piece) => piece.group)
    expect(groups[1]).toBe(groups[3])
    expect(groups[1]).not.toBe("g")
  })
})

it.each([
  [0, 0],
  [190, -170],
  [-190, 170],
  [540, 180],
  [-180, 180],
])("%d degrees are %d", (degrees, within) => {
  expect(edits.turned(degrees)).toBe(within)
})
