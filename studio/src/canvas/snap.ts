// Snapping: the nearest edge or centre, of the canvas or another layer, that what is dragged should stand at.

import type { Extent } from "../document"
import type { Box } from "./geometry"

/** A line to show while something stands at it. */
export interface Guide {
  readonly axis: "x" | "y"
  readonly at: number
}

export interface Snap {
  /** What to add to where the pointer puts it. */
  readonly right: number
  readonly down: number
  readonly guides: readonly Guide[]
}

/** Where things may stand on each axis: edges and centres of the canvas and of the boxes that do not move. */
export function targets(canvas: Extent, still: readonly Box[]): { x: number[]; y: number[] } {
  return {
    x: [0, canvas.width / 2, canvas.width, ...still.flatMap(across)],
    y: [0, canvas.height / 2, canvas.height, ...still.flatMap(along)],
  }
}

/** `reach`: how near, in canvas pixels, something must be to be caught. */
export function snap(
  box: Box,
  { x, y }: { readonly x: readonly number[]; readonly y: readonly number[] },
  reach: number,
): Snap {
  const right = nearest(across(box), x, reach)
  const down = nearest(along(box), y, reach)
  const guides: Guide[] = []
  if (right) guides.push({ axis: "x", at: right.at })
  if (down) guides.push({ axis: "y", at: down.at })
  return { right: right?.by ?? 0, down: down?.by ?? 0, guides }
}

const across = ({ left, right }: Box) => [left, (left + right) / 2, right]
const along = ({ top, bottom }: Box) => [top, (top + bottom) / 2, bottom]

function nearest(own: readonly number[], others: readonly number[], reach: number) {
  let found: { by: number; at: number } | undefined
  for (const at of others)
    for (const value of own) {
      const by = at - value
      if (Math.abs(by) <= reach && (!found || Math.abs(by) < Math.abs(found.by))) found = { by, at }
    }
  return found
}
