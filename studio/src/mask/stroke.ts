// The geometry of a stroke: circles that follow the pointer, and the area between each and the next.

import type { Box } from "../canvas/geometry"

/** A place of the brush, in pixels of the picture it paints on. */
export interface Dab {
  readonly x: number
  readonly y: number
  readonly radius: number
}

/** How wide a stroke is at this pressure of a pen, as a part of the brush: a mouse and a finger have none. */
export function width({ pointerType, pressure }: Pick<PointerEvent, "pointerType" | "pressure">) {
  return pointerType === "pen" ? 0.25 + 0.75 * pressure : 1
}

/** The corners of the band between two dabs; none where one lies in the other. */
export function band(from: Dab, to: Dab): { x: number; y: number }[] {
  const [dx, dy] = [to.x - from.x, to.y - from.y]
  const distance = Math.hypot(dx, dy)
  const lean = (from.radius - to.radius) / distance
  if (!distance || Math.abs(lean) >= 1) return []
  // The common tangents of both circles touch them at this angle from the line between.
  const along = Math.atan2(dy, dx)
  const off = Math.acos(lean)
  return [
    [from, along + off],
    [to, along + off],
    [to, along - off],
    [from, along - off],
  ].map(([dab, angle]) => {
    const { x, y, radius } = dab as Dab
    return {
      x: x + radius * Math.cos(angle as number),
      y: y + radius * Math.sin(angle as number),
    }
  })
}

/** The box around some dabs, with a margin. */
export function reach(dabs: readonly Dab[], margin: number): Box {
  return {
    left: Math.floor(Math.min(...dabs.map(({ x, radius }) => x - radius)) - margin),
    top: Math.floor(Math.min(...dabs.map(({ y, radius }) => y - radius)) - margin),
    right: Math.ceil(Math.max(...dabs.map(({ x, radius }) => x + radius)) + margin),
    bottom: Math.ceil(Math.max(...dabs.map(({ y, radius }) => y + radius)) + margin),
  }
}
