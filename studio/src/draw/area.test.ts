import { expect, it } from "vitest"
import { Area } from "./area"

const extent = { width: 20, height: 10 }
const filled = (from: number, to: number) =>
  Uint8ClampedArray.from({ length: 200 }, (_, at) => (at % 20 >= from && at % 20 < to ? 255 : 0))
const area = () =>
  new Area(
    extent,
    new Map([
      ["cake", filled(0, 5)],
      ["cup", filled(5, 10)],
    ]),
  )
const at = (cover: Uint8ClampedArray, x: number, y: number) => cover[y * 20 + x]

it("is what is seen of the layers until it is painted", () => {
  const untouched = area()
  expect(untouched.isPainted).toBe(false)
  expect(untouched.of("cake")).toEqual(filled(0, 5))
  expect(untouched.whole()).toEqual(filled(0, 10))
})

it("is widened for the front layer alone, and narrowed for each", () => {
  const painted = area()
  painted.stroke({ x: 15, y: 5 }, { x: 15, y: 5 }, 3, "widen")
  painted.stroke({ x: 2, y: 0 }, { x: 2, y: 9 }, 3, "narrow")
  expect(at(painted.of("cup"), 15, 5)).toBe(255)
  expect(at(painted.of("cake"), 15, 5)).toBe(0)
  expect(at(painted.of("cake"), 2, 5)).toBe(0)
  expect(at(painted.whole(), 7, 5)).toBe(255)
  painted.reset()
  expect(painted.whole()).toEqual(filled(0, 10))
})

it("takes a stroke back by the other brush", () => {
  const painted = area()
  for (const brush of ["widen", "narrow"] as const)
    painted.stroke({ x: 12, y: 5 }, { x: 18, y: 5 }, 2, brush)
  expect(at(painted.whole(), 15, 5)).toBe(0)
})

it("keeps its strokes when other layers are chosen", () => {
  const painted = area()
  painted.stroke({ x: 15, y: 5 }, { x: 15, y: 5 }, 3, "widen")
  const other = new Area(extent, new Map([["cake", filled(0, 5)]]), painted)
  expect(other.isPainted).toBe(true)
  expect(at(other.of("cake"), 15, 5)).toBe(255)
})
