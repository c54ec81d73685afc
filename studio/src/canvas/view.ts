// What part of the canvas is seen, and what lies over it: the page's alone, no part of the document and of no undo.

import { create } from "zustand"
import type { Extent } from "../document"
import type { Point } from "./geometry"

/** Screen pixel = offset + scale * canvas pixel, within the region that holds the canvas. */
export interface View {
  readonly x: number
  readonly y: number
  readonly scale: number
  /** The region, CSS pixels. */
  readonly region: Extent
  /** Whether the whole canvas is kept in view as the region changes. */
  readonly isFitted: boolean
}

export type Tool = "move" | "brush" | "eraser" | "crop" | "select"
export type Overlay = "none" | "composite" | "masks" | "noise" | "control"

interface Desk {
  readonly tool: Tool
  readonly overlay: Overlay
  readonly tab: "scene" | "layer"
  /** Diameter of the brush, canvas pixels of a canvas 100 wide: the same share of any canvas. */
  readonly brush: number
  /** Part of the brush's radius that fades, 0 to 1. */
  readonly softness: number
}

export const useDesk = create<Desk>()(() => ({
  tool: "move",
  overlay: "none",
  tab: "scene",
  brush: 8,
  softness: 0.4,
}))

export const useView = create<View>()(() => ({
  x: 0,
  y: 0,
  scale: 1,
  region: { width: 0, height: 0 },
  isFitted: true,
}))

/** Puts the tool in hand down; what it was at is left as it is. */
export const putDown = () => useDesk.setState({ tool: "move" })

const SMALLEST = 0.05
const LARGEST = 64
const MARGIN = 24
// Above and below, where there is room: the tools that float there.
const TOOLS = 56
const STEP = 1.25

export function toView(point: Point): Point {
  const { x, y, scale } = useView.getState()
  return { x: (point.x - x) / scale, y: (point.y - y) / scale }
}

/** Shows the whole canvas, in the middle. */
export function showAll(canvas: Extent): void {
  const { region } = useView.getState()
  if (!region.width || !region.height) return
  const beside = Math.min(MARGIN, region.width / 16)
  const above = region.height > 480 ? TOOLS : Math.min(MARGIN, region.height / 16)
  const scale = Math.min(
    (region.width - 2 * beside) / canvas.width,
    (region.height - 2 * above) / canvas.height,
  )
  useView.setState({
    scale,
    x: (region.width - scale * canvas.width) / 2,
    y: (region.height - scale * canvas.height) / 2,
    isFitted: true,
  })
}

/** Zooms so that what is at `point` of the region (its middle where none is given) stays there. */
export function zoom(factor: number, point?: Point): void {
  const { x, y, scale, region } = useView.getState()
  const at = point ?? { x: region.width / 2, y: region.height / 2 }
  const next = Math.min(Math.max(scale * factor, SMALLEST), LARGEST)
  const grown = next / scale
  useView.setState({
    scale: next,
    x: at.x - (at.x - x) * grown,
    y: at.y - (at.y - y) * grown,
    isFitted: false,
  })
}

export const zoomIn = () => zoom(STEP)
export const zoomOut = () => zoom(1 / STEP)

export function pan(right: number, down: number): void {
  const { x, y } = useView.getState()
  useView.setState({ x: x + right, y: y + down, isFitted: false })
}

/** The canvas' own rectangle within its region, CSS pixels: where to lay something over it. */
export function paper({ x, y, scale }: View, canvas: Extent) {
  return { left: x, top: y, width: scale * canvas.width, height: scale * canvas.height }
}
