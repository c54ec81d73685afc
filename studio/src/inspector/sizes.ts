// Canvas sizes that a model draws well: of about the area it was trained at, in the shapes that people use.

import type { Extent } from "../document"
import type { Model } from "../gen/collage/v1/collage_service_pb"

type Limits = Pick<Model, "sizeMultiple" | "minSide" | "maxSide" | "nativeSide">

const SHAPES = [
  [1, 1],
  [4, 3],
  [3, 4],
  [3, 2],
  [2, 3],
  [16, 9],
  [9, 16],
] as const

/** Allowed sizes, the square first, each once. */
export function sizesOf(model: Limits): Extent[] {
  const found = new Map<string, Extent>()
  for (const [across, down] of SHAPES) {
    const unit = model.nativeSide / Math.sqrt(across * down)
    const size = { width: allowed(unit * across, model), height: allowed(unit * down, model) }
    found.set(`${size.width} × ${size.height}`, size)
  }
  return [...found.values()]
}

/** The allowed side nearest to this one. */
export function allowed(side: number, { sizeMultiple, minSide, maxSide }: Limits): number {
  const step = sizeMultiple || 1
  const smallest = Math.ceil(minSide / step) * step
  const largest = Math.floor(maxSide / step) * step
  return Math.min(Math.max(Math.round(side / step) * step, smallest), largest)
}

/** A size that the model takes, for a collage of another: the same where it is one, else of the area it draws well. */
export function fitting(size: Extent, model: Limits): Extent {
  const { width, height } = size
  if (allowed(width, model) === width && allowed(height, model) === height) return size
  const factor = model.nativeSide / Math.sqrt(width * height)
  return { width: allowed(width * factor, model), height: allowed(height * factor, model) }
}
