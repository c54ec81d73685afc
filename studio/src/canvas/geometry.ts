// Where pieces lie on the canvas: boxes to snap and select by, and what a pointer catches. Canvas pixels throughout.

import type { Extent, Placement } from "../document"
import type { Pixels } from "../pictures"

export interface Point {
  readonly x: number
  readonly y: number
}

export interface Box {
  readonly left: number
  readonly top: number
  readonly right: number
  readonly bottom: number
}

/** A point of the canvas in a picture's own pixels, from its top left corner, before it was mirrored, sized and turned. */
export function toPicture(point: Point, at: Placement, picture: Extent): Point {
  const angle = (at.rotation * Math.PI) / 180
  const right = point.x - at.x
  const down = point.y - at.y
  const x = (Math.cos(angle) * right + Math.sin(angle) * down) / at.scale
  const y = (Math.cos(angle) * down - Math.sin(angle) * right) / at.scale
  return {
    x: (at.flipHorizontal ? -x : x) + picture.width / 2,
    y: (at.flipVertical ? -y : y) + picture.height / 2,
  }
}

/** The way back: a point of the picture on the canvas. */
export function toCanvas(point: Point, at: Placement, picture: Extent): Point {
  const angle = (at.rotation * Math.PI) / 180
  const right = (point.x - picture.width / 2) * (at.flipHorizontal ? -1 : 1) * at.scale
  const down = (point.y - picture.height / 2) * (at.flipVertical ? -1 : 1) * at.scale
  return {
    x: at.x + Math.cos(angle) * right - Math.sin(angle) * down,
    y: at.y + Math.sin(angle) * right + Math.cos(angle) * down,
  }
}

/** The upright box around what is not transparent in a placed picture. */
export function boxOf(at: Placement, pixels: Pick<Pixels, "width" | "height" | "alpha">): Box {
  const solid = solidPart(pixels)
  const corners = [
    { x: solid.left, y: solid.top },
    { x: solid.right, y: solid.top },
    { x: solid.left, y: solid.bottom },
    { x: solid.right, y: solid.bottom },
  ].map((corner) => toCanvas(corner, at, pixels))
  return {
    left: Math.min(...corners.map(({ x }) => x)),
    top: Math.min(...corners.map(({ y }) => y)),
    right: Math.max(...corners.map(({ x }) => x)),
    bottom: Math.max(...corners.map(({ y }) => y)),
  }
}

// What is fainter catches no pointer.
const FAINT = 24
const solids = new WeakMap<object, Box>()

/** The part of a picture, in its own pixels, outside of which all is transparent; the whole where all is. */
export function solidPart({
  width,
  height,
  alpha,
}: Pick<Pixels, "width" | "height" | "alpha">): Box {
  const known = solids.get(alpha)
  if (known) return known
  let [left, top, right, bottom] = [alpha.width, alpha.height, 0, 0]
  alpha.data.forEach((value, index) => {
    if (value < FAINT) return
    const x = index % alpha.width
    const y = Math.floor(index / alpha.width)
    left = Math.min(left, x)
    right = Math.max(right, x + 1)
    top = Math.min(top, y)
    bottom = Math.max(bottom, y + 1)
  })
  const across = width / alpha.width
  const down = height / alpha.height
  const found =
    right > left
      ? { left: left * across, top: top * down, right: right * across, bottom: bottom * down }
      : { left: 0, top: 0, right: width, bottom: height }
  solids.set(alpha, found)
  return found
}

/** Whether a pointer at this point of the canvas is on what shows of a placed picture. */
export function hits(
  point: Point,
  at: Placement,
  pixels: Pick<Pixels, "width" | "height" | "alpha">,
): boolean {
  const { x, y } = toPicture(point, at, pixels)
  if (x < 0 || y < 0 || x >= pixels.width || y >= pixels.height) return false
  const { alpha } = pixels
  const column = Math.floor((x / pixels.width) * alpha.width)
  const row = Math.floor((y / pixels.height) * alpha.height)
  return (alpha.data[row * alpha.width + column] ?? 0) >= FAINT
}

export function around(boxes: readonly Box[]): Box | undefined {
  if (boxes.length === 0) return undefined
  return {
    left: Math.min(...boxes.map((box) => box.left)),
    top: Math.min(...boxes.map((box) => box.top)),
    right: Math.max(...boxes.map((box) => box.right)),
    bottom: Math.max(...boxes.map((box) => box.bottom)),
  }
}

export function overlap(one: Box, other: Box): boolean {
  return (
    one.left < other.right &&
    other.left < one.right &&
    one.top < other.bottom &&
    other.top < one.bottom
  )
}
