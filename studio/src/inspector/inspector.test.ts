import { describe, expect, it } from "vitest"
import { filled, offers, openAt, parts } from "./chips"
import { allowed, sizesOf } from "./sizes"

describe("placeholders", () => {
  it("are told from words and from those of no layer", () => {
    expect(parts("a {cake} on {table}", ["cake"])).toEqual([
      { text: "a ", kind: "words" },
      { text: "{cake}", kind: "name" },
      { text: " on ", kind: "words" },
      { text: "{table}", kind: "unknown" },
    ])
  })

  it.each([
    ["a {ca", 5, { start: 2, typed: "ca" }],
    ["a {", 3, { start: 2, typed: "" }],
    ["a {cake} and", 12, undefined],
    ["a { cake", 8, undefined],
    ["a {ca and {b", 5, { start: 2, typed: "ca" }],
  ])("%j with the caret at %d", (prompt, caret, open) => {
    expect(openAt(prompt, caret)).toEqual(open)
  })

  it("are offered by their beginning first", () => {
    expect(offers(["pancake", "cup", "cake"], "ca")).toEqual(["cake", "pancake"])
    expect(offers(["cup", "cake"], "")).toEqual(["cup", "cake"])
  })

  it.each([
    ["a {ca", 2, 5, { prompt: "a {cake}", caret: 8 }],
    ["a {ca}, tea", 2, 5, { prompt: "a {cake}, tea", caret: 8 }],
    ["a", 1, 1, { prompt: "a {cake}", caret: 8 }],
    ["", 0, 0, { prompt: "{cake}", caret: 6 }],
  ])("%j from %d to %d is filled", (prompt, start, end, after) => {
    expect(filled(prompt, start, end, "cake")).toEqual(after)
  })
})

describe("sizes", () => {
  const large = { sizeMultiple: 64, minSide: 256, maxSide: 1024, nativeSide: 512 }
  it("have the model's area and multiples", () => {
    expect(sizesOf(large)).toContainEqual({ width: 512, height: 512 })
    for (const { width, height } of sizesOf(large)) {
      expect(width % 64).toBe(0)
      expect((width * height) / 512 ** 2).toBeGreaterThan(0.8)
      expect((width * height) / 512 ** 2).toBeLessThan(1.25)
    }
  })

  it("are none twice where a model takes one side only", () => {
    const fixed = { sizeMultiple: 8, minSide: 128, maxSide: 128, nativeSide: 128 }
    expect(sizesOf(fixed)).toEqual([{ width: 128, height: 128 }])
  })

  it("are moved to the nearest allowed one", () => {
    expect(allowed(500, large)).toBe(512)
    expect(allowed(10, large)).toBe(256)
    expect(allowed(9000, large)).toBe(1024)
  })
})
