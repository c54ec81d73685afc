// Pictures by their digest: their bytes (here, in IndexedDB, or at the server), and their pixels as the canvas draws them.

import { create } from "zustand"
import type { Extent } from "./document"
import type { BlobRef } from "./gen/collage/v1/blob_pb"
import { savedPicture, savePicture } from "./saved"
import { download, refOf } from "./server"

export interface Pixels extends Extent {
  /** The picture at its own size, then halved again and again: what is drawn small is averaged over areas first. */
  readonly levels: readonly CanvasImageSource[]
  /** Alpha, row by row, of a small copy: what the pointer can catch. */
  readonly alpha: { readonly width: number; readonly height: number; readonly data: Uint8Array }
}

interface Pictures {
  readonly pixels: ReadonlyMap<string, Pixels>
  /** Digests whose bytes are nowhere to be had. */
  readonly lost: ReadonlySet<string>
}

export const usePictures = create<Pictures>()(() => ({ pixels: new Map(), lost: new Set() }))

const blobs = new Map<string, Blob>()
const loading = new Map<string, Promise<void>>()
const ALPHA_SIDE = 96

/** Takes a picture in: names it, decodes it, keeps it. */
export async function addPicture(blob: Blob): Promise<{ ref: BlobRef; pixels: Pixels }> {
  const ref = await refOf(blob)
  blobs.set(ref.sha256, blob)
  const pixels = await decode(blob)
  show(ref.sha256, pixels)
  await savePicture({ sha256: ref.sha256, blob, width: pixels.width, height: pixels.height })
  return { ref, pixels }
}

/** A picture's bytes, from the nearest place that has them; undefined where none has. */
export async function pictureBlob(digest: string): Promise<Blob | undefined> {
  const here = blobs.get(digest)
  if (here) return here
  const saved = await savedPicture(digest)
  if (saved) {
    blobs.set(digest, saved.blob)
    return saved.blob
  }
  try {
    const blob = await download(digest)
    blobs.set(digest, blob)
    return blob
  } catch {
    return undefined
  }
}

/** Has the pixels of a picture put into `usePictures`, once. */
export function load(digest: string): Promise<void> {
  if (!digest || usePictures.getState().pixels.has(digest)) return Promise.resolve()
  let promise = loading.get(digest)
  if (!promise) {
    promise = fetchPixels(digest).finally(() => loading.delete(digest))
    loading.set(digest, promise)
  }
  return promise
}

async function fetchPixels(digest: string): Promise<void> {
  const blob = await pictureBlob(digest)
  const pixels = blob && (await decode(blob).catch(() => undefined))
  if (blob && pixels) {
    show(digest, pixels)
    if (!(await savedPicture(digest)))
      await savePicture({ sha256: digest, blob, width: pixels.width, height: pixels.height })
  } else usePictures.setState(({ lost }) => ({ lost: new Set([...lost, digest]) }))
}

function show(digest: string, pixels: Pixels): void {
  usePictures.setState((state) => ({
    pixels: new Map([...state.pixels, [digest, pixels]]),
    lost: new Set([...state.lost].filter((other) => other !== digest)),
  }))
}

// Bytes of pixels that lie on no canvas and are kept: what undo brings back then shows at once.
const SPARE_BYTES = 256 * 2 ** 20

/** Forgets the pixels of pictures that are not used, the oldest first, beyond what is spared: `load` has them again. */
export function forgetUnused(used: ReadonlySet<string>): void {
  const { pixels } = usePictures.getState()
  let spare = 0
  const kept = [...pixels].reverse().filter(([digest, { width, height }]) => {
    if (used.has(digest)) return true
    // Four bytes a pixel; all smaller levels together are a third of the first.
    spare += (4 * width * height * 4) / 3
    return spare <= SPARE_BYTES
  })
  if (kept.length < pixels.size) usePictures.setState({ pixels: new Map(kept.reverse()) })
}

async function decode(blob: Blob): Promise<Pixels> {
  const bitmap = await createImageBitmap(blob)
  const { width, height } = bitmap
  const levels: CanvasImageSource[] = [bitmap]
  for (let w = width, h = height; w > 32 && h > 32; ) {
    w = Math.ceil(w / 2)
    h = Math.ceil(h / 2)
    levels.push(scaled(levels.at(-1) as CanvasImageSource, w, h))
  }
  const factor = Math.min(1, ALPHA_SIDE / Math.max(width, height))
  const small = scaled(
    levels.at(-1) as CanvasImageSource,
    Math.max(1, Math.round(width * factor)),
    Math.max(1, Math.round(height * factor)),
  )
  const context = small.getContext("2d") as CanvasRenderingContext2D
  const rgba = context.getImageData(0, 0, small.width, small.height).data
  const data = Uint8Array.from({ length: rgba.length / 4 }, (_, i) => rgba[4 * i + 3] as number)
  return { width, height, levels, alpha: { width: small.width, height: small.height, data } }
}

function scaled(source: CanvasImageSource, width: number, height: number): HTMLCanvasElement {
  const canvas = document.createElement("canvas")
  canvas.width = width
  canvas.height = height
  const context = canvas.getContext("2d") as CanvasRenderingContext2D
  context.imageSmoothingQuality = "high"
  context.drawImage(source, 0, 0, width, height)
  return canvas
}

/** The smallest level that still has a pixel for every pixel of the screen. */
export function levelFor(pixels: Pixels, scale: number): CanvasImageSource {
  const wanted = Math.floor(Math.log2(1 / Math.max(scale, 1e-6)))
  const index = Math.min(Math.max(wanted, 0), pixels.levels.length - 1)
  return pixels.levels[index] as CanvasImageSource
}
