import { create } from "zustand"
import type { Point } from "../canvas/geometry"
import { placement } from "../document"
import { selectedPieces, useStudio } from "../store"

/** Where the brush is, canvas pixels; nowhere while no pointer is over the canvas. */
export const useBrushAt = create<{ point?: Point }>()(() => ({}))

/** Moves the brush from the keyboard, from the middle of the selected layer on; `right` and `down` are canvas pixels. */
export function moveBrush(right: number, down: number): Point {
  const { size } = useStudio.getState().document
  const [piece] = selectedPieces(useStudio.getState())
  const middle = piece ? placement(piece.layer, size) : { x: size.width / 2, y: size.height / 2 }
  const { x, y } = useBrushAt.getState().point ?? middle
  const point = { x: x + right, y: y + down }
  useBrushAt.setState({ point })
  return point
}
