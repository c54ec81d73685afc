import "fake-indexeddb/auto"
import { expect, it, vi } from "vitest"
import { emptyDocument } from "./document"
import { addPiece, setScene } from "./edits"
import { Autosave, database } from "./saved"

const picture = {
  $typeName: "collage.v1.BlobRef" as const,
  sha256: "a".repeat(64),
  sizeBytes: 2n ** 40n,
  mediaType: "image/png",
}

it("saves the newest document, whole", async () => {
  const autosave = new Autosave((error) => expect.fail(String(error)))
  let document = addPiece(
    picture,
    { width: 9, height: 9 },
    { text: "cake" },
  )(emptyDocument({ width: 64, height: 64 }))
  for (let at = 0; at < 50; at++) {
    document = setScene({ prompt: `scene ${at}` })(document)
    autosave.save({ id: "own", document, at })
  }
  await vi.waitUntil(() => autosave.isIdle)
  expect(await (await database()).get("documents", "own")).toEqual({ id: "own", document, at: 49 })
})

it("goes on after a failure, and tells of it", async () => {
  const failed = vi.fn()
  const autosave = new Autosave(failed)
  const document = emptyDocument({ width: 64, height: 64 })
  autosave.save({ id: "bad", document, at: (() => 0) as unknown as number })
  await vi.waitUntil(() => autosave.isIdle)
  expect(failed).toHaveBeenCalledOnce()
  autosave.save({ id: "good", document, at: 1 })
  await vi.waitUntil(() => autosave.isIdle)
  expect(await (await database()).get("documents", "good")).toMatchObject({ at: 1 })
})
