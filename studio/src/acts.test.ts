import { beforeEach, expect, it } from "vitest"
import * as acts from "./acts"
import { emptyDocument } from "./document"
import { addPiece } from "./edits"
import { useStudio } from "./store"
import { useVoice } from "./voice"

const picture = {
  $typeName: "collage.v1.BlobRef" as const,
  sha256: "a".repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
}
const names = () => useStudio.getState().document.pieces.map(({ layer }) => layer.name)
const chosen = () => useStudio.getState().selection
const said = () => useVoice.getState().said.text

beforeEach(() => {
  const document = ["a", "b", "c"].reduce(
    (made, id) => addPiece(picture, { width: 8, height: 8 }, { text: id, id })(made),
    emptyDocument({ width: 64, height: 64 }),
  )
  useStudio.getState().restore(document)
})

it("copies are selected, and what was done is said", () => {
  useStudio.getState().select(["c", "a"])
  acts.duplicateSelected()
  expect(names()).toEqual(["a", "a-2", "b", "c", "c-2"])
  const copies = useStudio.getState().document.pieces.filter(({ id }) => chosen().includes(id))
  expect(copies.map(({ layer }) => layer.name)).toEqual(["a-2", "c-2"])
  expect(said()).toBe("Duplicate a and c")
})

it("a locked layer is left where it is, and that is said", () => {
  acts.toggleLocked(["a"])
  useStudio.getState().select(["a"])
  acts.nudge(5, 0)
  expect(useStudio.getState().document.pieces[0]?.layer.transform?.x).toBe(32)
  expect(said()).toContain("locked")
  acts.removeSelected()
  expect(names()).toEqual(["a", "b", "c"])
})

it("a group is selected together until it is taken apart", () => {
  useStudio.getState().select(["a", "b"])
  acts.toggleGroup()
  useStudio.getState().select(["b"])
  expect(new Set(chosen())).toEqual(new Set(["a", "b"]))
  acts.toggleGroup()
  useStudio.getState().select(["b"])
  expect(chosen()).toEqual(["b"])
})

it("order is told from the front", () => {
  acts.stepPieces(["a"], 1)
  expect(names()).toEqual(["b", "a", "c"])
  expect(said()).toBe("a, 2 of 3 from the front")
  acts.takeBack()
  expect(said()).toBe("Took back: Reorder a")
  expect(names()).toEqual(["a", "b", "c"])
})

it("several moves by keys are one step of undo", () => {
  useStudio.getState().select(["a"])
  acts.nudge(1, 0)
  acts.nudge(10, 0)
  expect(said()).toBe("a at 43, 32")
  acts.takeBack()
  expect(useStudio.getState().document.pieces[0]?.layer.transform?.x).toBe(32)
})
