import { beforeEach, expect, it, vi } from "vitest"
import { emptyDocument } from "./document"
import { addPiece, group, remove, setScene } from "./edits"
import { redo, undo, useStudio } from "./store"

const picture = {
  $typeName: "collage.v1.BlobRef" as const,
  sha256: "a".repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
}
const add = (id: string) => addPiece(picture, { width: 9, height: 9 }, { text: id, id })
const studio = () => useStudio.getState()
const ids = () => studio().document.pieces.map(({ id }) => id)

beforeEach(() => studio().restore(emptyDocument({ width: 64, height: 64 })))

it("takes edits back and does them again, by name", () => {
  studio().change("Add a", add("a"))
  studio().change("Add b", add("b"))
  studio().select(["b"])
  expect(undo()).toBe("Add b")
  expect(ids()).toEqual(["a"])
  expect(studio().selection).toEqual([])
  expect(undo()).toBe("Add a")
  expect(undo()).toBeUndefined()
  expect(redo()).toBe("Add a")
  expect(redo()).toBe("Add b")
  expect(redo()).toBeUndefined()
  expect(ids()).toEqual(["a", "b"])
})

it("makes one step of edits with one key that follow one another, until a pause", () => {
  const now = vi.spyOn(performance, "now")
  const type = (prompt: string, time: number) => {
    now.mockReturnValue(time)
    studio().change("Scene", setScene({ prompt }), "prompt")
  }
  type("a", 0)
  type("ab", 500)
  type("abc", 1000)
  type("abcd", 5000)
  now.mockRestore()
  undo()
  expect(studio().document.prompt).toBe("abc")
  undo()
  expect(studio().document.prompt).toBe("")
})

it("leaves no step where nothing changed", () => {
  studio().change("Nothing", (document) => document)
  expect(undo()).toBeUndefined()
})

it("selects groups whole and forgets what is gone", () => {
  for (const id of ["a", "b", "c"]) studio().change(`Add ${id}`, add(id))
  studio().change("Group", group(["a", "b"], "g"))
  studio().select(["a"])
  expect(studio().selection).toEqual(["a", "b"])
  studio().change("Delete", remove(["a"]))
  expect(studio().selection).toEqual(["b"])
})
