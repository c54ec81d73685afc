import { describe, expect, it } from "vitest"
import type { Placement } from "../document"
import { boxOf, hits, toCanvas, toPicture } from "./geometry"
import { keyOf } from "./keys"
import { noiseMap } from "./noise"
import { snap, targets } from "./snap"

const at: Placement = {
  x: 50,
  y: 40,
  scale: 2,
  rotation: 90,
  flipHorizontal: true,
  flipVertical: false,
}
// Ten by ten, opaque in the left half.
const half = {
  width: 10,
  height: 10,
  alpha: {
    width: 10,
    height: 10,
    data: Uint8Array.from({ length: 100 }, (_, i) => (i % 10 < 5 ? 255 : 0)),
  },
}

describe("a placed picture", () => {
  it("is mirrored, sized, turned and moved, in this order", () => {
    // The left edge's middle goes to the right by the mirror, then down by the turn.
    const point = toCanvas({ x: 0, y: 5 }, at, half)
    expect(point.x).toBeCloseTo(50)
    expect(point.y).toBeCloseTo(50)
    const back = toPicture(point, at, half)
    expect(back.x).toBeCloseTo(0)
    expect(back.y).toBeCloseTo(5)
  })

  it("has a box around what shows of it", () => {
    const box = boxOf(at, half)
    expect(box.left).toBeCloseTo(40)
    expect(box.right).toBeCloseTo(60)
    expect(box.top).toBeCloseTo(40)
    expect(box.bottom).toBeCloseTo(50)
  })

  it("is caught where it shows, not where it is transparent", () => {
    expect(hits({ x: 50, y: 45 }, at, half)).toBe(true)
    expect(hits({ x: 50, y: 35 }, at, half)).toBe(false)
    expect(hits({ x: 50, y: 51 }, at, half)).toBe(false)
  })
})

describe("snapping", () => {
  const still = [{ left: 20, top: 20, right: 40, bottom: 40 }]
  const places = targets({ width: 100, height: 100 }, still)

  it("takes the nearest of edges and centres, each axis alone", () => {
    const box = { left: 41, top: 70, right: 71, bottom: 90 }
    expect(snap(box, places, 3)).toEqual({ right: -1, down: 0, guides: [{ axis: "x", at: 40 }] })
  })

  it("centres on the canvas", () => {
    const box = { left: 43, top: 44, right: 55, bottom: 54 }
    expect(snap(box, { x: [50], y: [50] }, 3)).toMatchObject({ right: 1, down: 1 })
  })

  it("leaves what is far where it is", () => {
    const box = { left: 60, top: 60, right: 72, bottom: 72 }
    expect(snap(box, places, 3)).toEqual({ right: 0, down: 0, guides: [] })
  })
})

it.each([
  ["z", "KeyZ", "z"],
  ["Z", "KeyZ", "z"],
  ["я", "KeyZ", "z"],
  ["w", "KeyZ", "w"],
  ["à", "Digit0", "0"],
  ["0", "Numpad0", "0"],
  ["*", "BracketRight", "]"],
  ["+", "BracketRight", "+"],
  ["=", "Equal", "+"],
  ["-", "Slash", "-"],
  ["ArrowUp", "ArrowUp", "ArrowUp"],
])("%s at %s is the key %s", (key, code, name) => {
  expect(keyOf({ key, code })).toBe(name)
})

it("the noise map is free where nothing lies, and nowhere freer than a layer's noise allows", () => {
  const size = { width: 64, height: 32 }
  const left = Float32Array.from({ length: 64 * 32 }, (_, i) => (i % 64 < 32 ? 1 : 0))
  const map = noiseMap([{ mask: left, noise: 0.25 }], size, 2)
  expect([map.width, map.height]).toEqual([32, 16])
  expect(map.values[0]).toBeCloseTo(0.25)
  expect(map.values[31]).toBeCloseTo(1)
  expect(map.values[15]).toBeCloseTo(0.25)
  // The blur holds back beyond the border.
  expect(map.values[16]).toBeLessThan(0.999)
})
