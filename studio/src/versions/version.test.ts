import { create } from "@bufbuild/protobuf"
import { expect, it } from "vitest"
import { emptyDocument } from "../document"
import { addPiece, moveBy, remove, setLayers, setSampling, setScene, step } from "../edits"
import { type JobEvent, JobEventSchema } from "../gen/collage/v1/collage_service_pb"
import { changes } from "./changes"
import { AT_FIRST, advanced, secondsLeft } from "./progress"
import { together, tree, type Version } from "./version"

const picture = {
  $typeName: "collage.v1.BlobRef" as const,
  sha256: "a".repeat(64),
  sizeBytes: 1n,
  mediaType: "image/png",
}
const add = (id: string) => addPiece(picture, { width: 9, height: 9 }, { text: id, id })
const two = add("fork")(add("cake")(emptyDocument({ width: 64, height: 64 })))

function version(number: number, parent?: number, sweep?: string): Version {
  return {
    id: `v${number}`,
    collage: "own",
    parent: parent === undefined ? undefined : { version: `v${parent}`, index: 0 },
    document: two,
    work: { case: undefined },
    requestId: `r${number}`,
    sequence: 0n,
    state: "done",
    images: [],
    at: number,
    number,
    changed: [],
    sweep,
  }
}

it("says what is different between two documents", () => {
  expect(changes(two, two)).toEqual([])
  expect(changes(two, setScene({ prompt: "a {cake}" })(two))).toEqual(["Scene"])
  expect(changes(two, setLayers(["cake"], { noise: 0.3 })(two))).toEqual([
    "cake: noise automatic → 0.3",
  ])
  expect(changes(two, moveBy(["cake"], 1, 0)(two))).toEqual(["Moved cake"])
  expect(changes(two, setLayers(["fork"], { visible: false })(two))).toEqual(["Hid fork"])
  expect(changes(two, step(["cake"], 1)(two))).toEqual(["Order of layers"])
  expect(changes(two, setSampling({ steps: 12 })(two))).toEqual(["steps automatic → 12"])
  expect(changes(two, remove(["fork"])(two))).toEqual(["Scene", "Deleted fork"])
  expect(changes(two, add("cup")(two))).toEqual(["Scene", "Added cup"])
})

it("does not call the number of options a change", () => {
  expect(changes(two, setSampling({ images: 4 })(two))).toEqual([])
})

it("puts each version below its parent, and one whose parent is gone at the top", () => {
  const versions = [version(1), version(2), version(3, 1), version(4, 3), version(5, 9)]
  expect(tree(versions).map((node) => [node.version.number, node.depth])).toEqual([
    [1, 0],
    [3, 1],
    [4, 2],
    [2, 0],
    [5, 0],
  ])
})

it("shows a sweep's versions side by side, another's alone", () => {
  const versions = [version(1), version(3, 1, "s"), version(2, 1, "s")]
  const numbers = (number: number) =>
    together(versions, versions.find((each) => each.number === number) as Version).map(
      (each) => each.number,
    )
  expect(numbers(3)).toEqual([2, 3])
  expect(numbers(1)).toEqual([1])
})

const event = (kind: JobEvent["kind"]) => create(JobEventSchema, { kind })

it("tells how long is left from the job's own pace", () => {
  const step = (number: number) =>
    event({
      case: "step",
      value: { $typeName: "collage.v1.Step", step: number, total: 10 },
    })
  let progress = advanced(
    AT_FIRST,
    event({ case: "queued", value: { $typeName: "collage.v1.Queued", position: 2 } }),
    0,
  )
  expect(progress.position).toBe(2)
  expect(secondsLeft(progress, 0)).toBeUndefined()
  progress = advanced(progress, step(1), 1000)
  expect(progress.position).toBeUndefined()
  progress = advanced(progress, step(3), 5000)
  expect(secondsLeft(progress, 5000)).toBe(14)
  expect(secondsLeft(progress, 6000)).toBe(13)
})

it("begins again where a job is given back", () => {
  const step = event({
    case: "step",
    value: { $typeName: "collage.v1.Step", step: 7, total: 10 },
  })
  const again = event({
    case: "stageStarted",
    value: { $typeName: "collage.v1.StageStarted", stage: "generate", attempt: 2 },
  })
  expect(advanced(advanced(AT_FIRST, step, 0), again, 1)).toMatchObject({
    step: 0,
    first: undefined,
  })
})
