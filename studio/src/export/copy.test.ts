import { fromJsonString } from "@bufbuild/protobuf"
import { expect, it } from "vitest"
import { emptyDocument } from "../document"
import { addPiece, setLayers, setSampling, setScene } from "../edits"
import { PlanCollageRequestSchema } from "../gen/collage/v1/collage_service_pb"
import { asCommand, asJson, asPython } from "./copy"

const picture = {
  $typeName: "collage.v1.BlobRef" as const,
  sha256: "a".repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
}
const cake = addPiece(
  picture,
  { width: 9, height: 9 },
  { text: 'a "big" cake\\', id: "cake" },
)(emptyDocument({ width: 64, height: 64 }))
const document = setSampling({ images: 2, seed: 2n ** 63n, sampler: "dpm 2's" })(
  setLayers(["cake"], { noise: 0, seed: 0n })(setScene({ prompt: 'x """ {cake} \\' })(cake)),
)

it("copies JSON that is the request, every number of it", () => {
  const request = fromJsonString(PlanCollageRequestSchema, asJson(document))
  expect(request.sampling).toMatchObject({ images: 2, seed: 2n ** 63n })
  expect(request.collage?.layers[0]).toMatchObject({ noise: 0, seed: 0n, text: 'a "big" cake\\' })
  expect(request.collage?.prompt).toBe('x """ {cake} \\')
})

it("copies Python whose string is that JSON", () => {
  const json = asPython(document).split('r"""\n')[1]?.split('\n""",')[0] ?? ""
  expect(json.trim()).toBe(asJson(document))
})

it("copies a command whose words are a shell's", () => {
  expect(asCommand(document, "my collage.ora")).toBe(
    "collage generate 'my collage.ora' --images 2 --seed 9223372036854775808" +
      ` --sampler 'dpm 2'\\''s' --out out/collage`,
  )
})
