// The area of a redo: what is seen of the chosen layers, widened and narrowed by a brush.

import type { Extent } from "../document"

export type Brush = "widen" | "narrow"

/** 8-bit coverage, row by row, of a canvas. */
type Coverage = Uint8ClampedArray

export class Area {
  readonly #added: Coverage
  readonly #erased: Coverage
  isPainted = false

  /** masks: what is seen of each chosen layer, by name, back to front. */
  constructor(
    readonly extent: Extent,
    readonly masks: ReadonlyMap<string, Coverage>,
    of?: Area,
  ) {
    const length = extent.width * extent.height
    // Other layers chosen, the same strokes.
    const same = of && of.#added.length === length
    this.#added = same ? of.#added : new Uint8ClampedArray(length)
    this.#erased = same ? of.#erased : new Uint8ClampedArray(length)
    this.isPainted = same ? of.isPainted : false
  }

  /** A stroke with a soft edge of a quarter of its radius, from one point to another, in canvas pixels. */
  stroke(from: Point, to: Point, radius: number, brush: Brush): void {
    this.isPainted = true
    const [onto, off] =
      brush === "widen" ? [this.#added, this.#erased] : [this.#erased, this.#added]
    const { width, height } = this.extent
    const left = Math.max(0, Math.floor(Math.min(from.x, to.x) - radius))
    const right = Math.min(width - 1, Math.ceil(Math.max(from.x, to.x) + radius))
    const top = Math.max(0, Math.floor(Math.min(from.y, to.y) - radius))
    const bottom = Math.min(height - 1, Math.ceil(Math.max(from.y, to.y) + radius))
    const soft = Math.max(radius / 4, 0.5)
    for (let y = top; y <= bottom; y++)
      for (let x = left; x <= right; x++) {
        const distance = toSegment({ x: x + 0.5, y: y + 0.5 }, from, to)
        const cover = 255 * Math.min(1, Math.max(0, (radius - distance) / soft))
        if (cover === 0) continue
        const at = y * width + x
        onto[at] = Math.max(onto[at] as number, cover)
        off[at] = Math.min(off[at] as number, 255 - cover)
      }
  }

  reset(): void {
    this.isPainted = false
    this.#added.fill(0)
    this.#erased.fill(0)
  }

  /** What of a layer is drawn again. The front one gets what was widened. */
  of(name: string): Coverage {
    const mask = this.masks.get(name)
    const isFront = [...this.masks.keys()].at(-1) === name
    return Uint8ClampedArray.from(this.#added, (added, at) => {
      const own = ((mask?.[at] ?? 0) * (255 - (this.#erased[at] as number))) / 255
      return isFront ? Math.max(own, added) : own
    })
  }

  /** All that is drawn again. */
  whole(): Coverage {
    const names = [...this.masks.keys()]
    const [first, ...others] = names.map((name) => this.of(name))
    const whole = first ?? new Uint8ClampedArray(this.extent.width * this.extent.height)
    for (const other of others)
      for (let at = 0; at < whole.length; at++)
        whole[at] = Math.max(whole[at] as number, other[at] as number)
    return whole
  }
}

export interface Point {
  readonly x: number
  readonly y: number
}

function toSegment(point: Point, from: Point, to: Point): number {
  const [dx, dy] = [to.x - from.x, to.y - from.y]
  const square = dx * dx + dy * dy
  const along = square ? ((point.x - from.x) * dx + (point.y - from.y) * dy) / square : 0
  const share = Math.min(1, Math.max(0, along))
  return Math.hypot(point.x - from.x - share * dx, point.y - from.y - share * dy)
}

/** The grey picture of a mask as coverage. */
export async function coverage(mask: Blob, { width, height }: Extent): Promise<Coverage> {
  const context = surface({ width, height })
  context.drawImage(await createImageBitmap(mask), 0, 0, width, height)
  const { data } = context.getImageData(0, 0, width, height)
  return Uint8ClampedArray.from({ length: width * height }, (_, at) => data[4 * at] as number)
}

/** A picture cut out by coverage. */
export async function cut(picture: Blob, cover: Coverage, extent: Extent): Promise<Blob> {
  const context = surface(extent)
  context.drawImage(await createImageBitmap(picture), 0, 0, extent.width, extent.height)
  const image = context.getImageData(0, 0, extent.width, extent.height)
  for (let at = 0; at < cover.length; at++) image.data[4 * at + 3] = cover[at] as number
  context.putImageData(image, 0, 0)
  return new Promise((done, failed) =>
    context.canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("no PNG")))),
  )
}

function surface({ width, height }: Extent): CanvasRenderingContext2D {
  const canvas = document.createElement("canvas")
  canvas.width = width
  canvas.height = height
  return canvas.getContext("2d", { willReadFrequently: true }) as CanvasRenderingContext2D
}
