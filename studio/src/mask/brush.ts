import type { Point } from "../canvas/geometry"

/** A stroke of the brush or the eraser on the selected layer. */
export function strokeOn(_event: PointerEvent, _at: (event: PointerEvent) => Point) {
  return undefined
}
