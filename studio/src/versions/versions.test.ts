import "fake-indexeddb/auto"
import { beforeEach, expect, it } from "vitest"
import { emptyDocument } from "../document"
import { setScene } from "../edits"
import { database } from "../saved"
import { useTab } from "../start"
import { undo, useStudio } from "../store"
import {
  addVersion,
  copyVersions,
  imageOf,
  pick,
  readVersions,
  record,
  useVersions,
} from "./versions"

const image = (index: number) => ({
  $typeName: "collage.v1.GeneratedImage" as const,
  index,
  seed: 7n,
  modelDigest: "",
  downloadUrl: "",
})
const document = emptyDocument({ width: 64, height: 64 })
const work = { case: undefined }

beforeEach(async () => {
  useTab.setState({ id: "own" })
  useStudio.getState().restore(document)
  await (await database()).clear("versions")
  await readVersions("own")
})

it("saves a version, with the id of its request, before anybody hears of it", async () => {
  const version = await addVersion(document, { work })
  expect(await (await database()).get("versions", version.id)).toEqual(version)
  expect(version).toMatchObject({ state: "new", number: 1 })
  expect(version.requestId).toMatch(/^[0-9a-f-]{36}$/)
})

it("finds all again after a reload, in order, with what became of them", async () => {
  const first = await addVersion(document, { work })
  await record(first.id, { job: "jobs/1", state: "running", sequence: 4n })
  await addVersion(document, { work })
  useVersions.setState({ versions: [] })
  const read = await readVersions("own")
  expect(read.map(({ number }) => number)).toEqual([1, 2])
  expect(read[0]).toMatchObject({ job: "jobs/1", state: "running", sequence: 4n })
})

it("makes what was picked the parent of the next, and undo takes the pick back", async () => {
  const first = await addVersion(document, { work })
  await record(first.id, { state: "done", images: [image(0), image(1)] })
  pick({ version: first.id, index: 1 })
  expect(imageOf(useStudio.getState().document.drawn)?.index).toBe(1)
  useStudio.getState().change("Scene", setScene({ prompt: "a cake" }))
  const second = await addVersion(useStudio.getState().document, { work })
  expect(second.parent).toEqual({ version: first.id, index: 1 })
  expect(second.changed).toEqual(["Scene"])
  undo()
  undo()
  expect(useStudio.getState().document.drawn).toBeUndefined()
})

it("gives a duplicated tab the drawn versions, and leaves those under way to the first", async () => {
  const first = await addVersion(document, { work })
  await record(first.id, { state: "done", images: [image(0)] })
  pick({ version: first.id, index: 0 })
  const second = await addVersion(useStudio.getState().document, { work })
  await record(second.id, { state: "done", images: [image(0)] })
  await addVersion(document, { work })
  await copyVersions("own", "copy")
  const copies = await readVersions("copy")
  expect(copies.map(({ number }) => number)).toEqual([1, 2])
  expect(copies[1]?.parent?.version).toBe(copies[0]?.id)
  expect(useStudio.getState().document.drawn?.version).toBe(copies[0]?.id)
  expect(await readVersions("own")).toHaveLength(3)
})
