import { create } from "@bufbuild/protobuf"
import { expect, it } from "vitest"
import { emptyDocument } from "../document"
import { addPiece, setLayers, setSampling } from "../edits"
import { SamplingSchema } from "../gen/collage/v1/collage_pb"
import type { RedoWork } from "../gen/collage/v1/collage_service_pb"
import { dialled, redoWork, values, withPreviews } from "./work"

const blob = (sign: string) => ({
  $typeName: "collage.v1.BlobRef" as const,
  sha256: sign.repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
})
const add = (id: string) => addPiece(blob("a"), { width: 9, height: 9 }, { text: id, id })
const three = add("cup")(add("fork")(add("cake")(emptyDocument({ width: 64, height: 48 }))))

it("asks for no more previews than the server makes", () => {
  for (const images of [1, 2, 4, 16])
    for (const steps of [1, 4, 20, 50, 1000]) {
      const { previewEvery = 0 } = withPreviews(create(SamplingSchema, { images, steps }))
      expect(previewEvery).toBeGreaterThanOrEqual(1)
      expect((steps / previewEvery) * images).toBeLessThanOrEqual(256)
    }
})

it("redoes layers with new noise, the others as they are", () => {
  const seeded = setSampling({ seed: 5n })(setLayers(["cake", "cup"], { seed: 7n })(three))
  const redo = { layers: ["cake"], images: 2, restoreCutout: true }
  const work = redoWork(seeded, blob("b"), redo).value as RedoWork
  expect(work.layers).toEqual(["cake"])
  expect(work.sampling).toMatchObject({ images: 2, seed: undefined })
  expect(work.collage?.layers.map(({ seed }) => seed)).toEqual([undefined, undefined, 7n])
  expect(work.restoreCutout).toBe(true)
})

it("lets painted areas stand for the layers, the front one before all others", () => {
  const areas = new Map([
    ["cake", blob("c")],
    ["fork", blob("d")],
  ])
  const redo = { layers: ["cake", "fork"], images: 1, restoreCutout: false, areas }
  const { collage } = redoWork(three, blob("b"), redo).value as RedoWork
  expect(collage?.layers.map(({ name }) => name)).toEqual(["cake", "cup", "fork"])
  expect(collage?.layers[2]).toMatchObject({
    image: { source: { value: { sha256: "d".repeat(64) } } },
    transform: { x: 32, y: 24, scale: 1 },
  })
})

it("sweeps evenly, and changes nothing but the dial", () => {
  const dial = { name: "noise", piece: "cake" } as const
  expect(values(dial, 0, 1, 5)).toEqual([0, 0.25, 0.5, 0.75, 1])
  expect(values({ name: "steps" }, 1, 2, 4)).toEqual([1, 2])
  const asked = dialled(three, dial, 0.25, 9n)
  expect(asked.pieces[0]?.layer.noise).toBe(0.25)
  expect(asked.pieces.slice(1)).toEqual(three.pieces.slice(1))
  expect(asked.sampling).toMatchObject({ images: 1, seed: 9n })
})
