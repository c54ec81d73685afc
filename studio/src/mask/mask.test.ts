import { describe, expect, it } from "vitest"
import { cropped } from "./cropping"
import { band, reach, width } from "./stroke"

describe("a stroke", () => {
  it("is as wide as the pen presses, and whole for a mouse", () => {
    expect(width({ pointerType: "mouse", pressure: 0.5 })).toBe(1)
    expect(width({ pointerType: "pen", pressure: 1 })).toBe(1)
    expect(width({ pointerType: "pen", pressure: 0 })).toBe(0.25)
  })

  it("joins two dabs by their common tangents", () => {
    const corners = band({ x: 0, y: 0, radius: 2 }, { x: 10, y: 0, radius: 2 })
    expect(corners.map(({ x }) => Math.round(x))).toEqual([0, 10, 10, 0])
    expect(corners.map(({ y }) => Math.round(y))).toEqual([2, 2, -2, -2])
    expect(band({ x: 0, y: 0, radius: 9 }, { x: 3, y: 0, radius: 2 })).toEqual([])
    expect(band({ x: 1, y: 1, radius: 2 }, { x: 1, y: 1, radius: 2 })).toEqual([])
  })

  it("reaches as far as its widest places", () => {
    const dabs = [
      { x: 10, y: 10, radius: 4 },
      { x: 20, y: 10, radius: 1 },
    ]
    expect(reach(dabs, 2)).toEqual({ left: 4, top: 4, right: 23, bottom: 16 })
  })
})

describe("a crop", () => {
  const at = {
    x: 50,
    y: 50,
    scale: 2,
    rotation: 90,
    flipHorizontal: false,
    flipVertical: false,
  }
  it("leaves what is kept where it lies", () => {
    // The right half of ten by ten: its centre is 2.5 pixels to the right, which the turn makes downwards.
    const box = { left: 5, top: 0, right: 10, bottom: 10 }
    const after = cropped(box, at, { width: 10, height: 10 })
    expect(after.x).toBeCloseTo(50)
    expect(after.y).toBeCloseTo(55)
  })

  it("of a mirrored picture moves the other way", () => {
    const box = { left: 5, top: 0, right: 10, bottom: 10 }
    const after = cropped(box, { ...at, flipHorizontal: true }, { width: 10, height: 10 })
    expect(after.y).toBeCloseTo(45)
  })
})
