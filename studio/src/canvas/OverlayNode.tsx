import type Konva from "konva"
import { useEffect } from "react"
import { Shape } from "react-konva"
import { create } from "zustand"
import { type Document, type Extent, pictureOf, placement } from "../document"
import type { LayerPlan } from "../gen/collage/v1/collage_pb"
import type { Plan } from "../gen/collage/v1/collage_service_pb"
import { useModel } from "../models"
import { usePictures } from "../pictures"
import { usePlan } from "../plan"
import { download } from "../server"
import { useDocument } from "../store"
import { noiseMap } from "./noise"
import { type Overlay, useDesk } from "./view"

/** The overlay as it is painted, and what it is of. */
export const usePainted = create<{ picture?: CanvasImageSource; plan?: Plan; kind?: Overlay }>()(
  () => ({}),
)

/** What the newest plan shows of the collage, over it. */
export function OverlayNode({ size, kind }: { size: Extent; kind: Overlay }) {
  const plan = usePlan((state) => state.plan)
  const of = usePlan((state) => state.of)
  const cell = useModel()?.latentFactor || 8
  const painted = usePainted()
  // What is of an older plan stays until the new one is painted, but another overlay never shows in its place.
  const picture = plan && painted.kind === kind ? painted.picture : undefined
  useEffect(() => {
    if (!plan || !of) return
    let isOld = false
    paint(plan, of, kind, cell)
      .then((picture) => isOld || usePainted.setState({ picture, plan, kind }))
      // The next plan brings another.
      .catch(() => {})
    return () => {
      isOld = true
    }
  }, [plan, of, kind, cell])
  if (!picture) return null
  return (
    <Shape
      {...size}
      sceneFunc={(context: Konva.Context) => {
        // Each pixel of the composite is shown as it is.
        context._context.imageSmoothingEnabled = false
        context.drawImage(picture, 0, 0, size.width, size.height)
        context._context.imageSmoothingEnabled = true
      }}
    />
  )
}

/** Marks the page while what it shows is of the newest plan: what measures it waits for that. */
export function usePlanMark(): void {
  const document = useDocument()
  const { of, plan } = usePlan()
  const overlay = useDesk((desk) => desk.overlay)
  const painted = usePainted()
  const isShown =
    of === document && (overlay === "none" || (painted.plan === plan && painted.kind === overlay))
  useEffect(() => {
    globalThis.document.documentElement.dataset.plan = isShown ? "shown" : "awaited"
  }, [isShown])
}

const KEPT = 96
const decoded = new Map<string, Promise<ImageBitmap>>()

function bitmap(digest: string): Promise<ImageBitmap> {
  const known = decoded.get(digest)
  if (known) return known
  const promise = download(digest).then((blob) => createImageBitmap(blob))
  promise.catch(() => decoded.delete(digest))
  decoded.set(digest, promise)
  for (const old of decoded.keys()) {
    if (decoded.size <= KEPT) break
    decoded.delete(old)
  }
  return promise
}

/** A colour for each layer, by its place in the order; neighbours are far apart. */
export function tint(index: number): string {
  return `hsl(${(index * 137.5 + 210) % 360} 80% 55%)`
}

async function paint(
  { composite, layers }: Plan,
  { size, pieces }: Document,
  kind: Overlay,
  cell: number,
): Promise<CanvasImageSource> {
  const { width, height } = size
  if (kind === "composite") return bitmap(composite?.sha256 ?? "")
  const sheet = blank(width, height)
  const context = sheet.getContext("2d") as CanvasRenderingContext2D
  if (kind === "masks") {
    for (const [index, layer] of layers.entries())
      context.drawImage(await masked(layer, tint(index), 0.6, width, height), 0, 0)
    return sheet
  }
  if (kind === "noise") {
    const painted = await Promise.all(
      layers.map(async (layer) => ({ mask: await cover(layer, size), noise: layer.noise })),
    )
    const map = noiseMap(painted, size, cell)
    const small = blank(map.width, map.height)
    const pixels = new ImageData(map.width, map.height)
    map.values.forEach((value, index) => {
      const grey = Math.round(255 * value)
      pixels.data.set([grey, grey, grey, 255], 4 * index)
    })
    small.getContext("2d")?.putImageData(pixels, 0, 0)
    return small
  }
  // Those that came with the collage: they lie as their layers do.
  context.fillStyle = "#000"
  context.fillRect(0, 0, width, height)
  context.globalCompositeOperation = "lighter"
  for (const { layer } of pieces)
    for (const { image } of layer.structure) {
      if (image?.source.case !== "blob") continue
      const picture = await bitmap(image.source.value.sha256)
      const own = usePictures.getState().pixels.get(pictureOf(layer))
      if (!own || layer.visible === false) continue
      const at = placement(layer, size)
      context.save()
      context.translate(at.x, at.y)
      context.rotate((at.rotation * Math.PI) / 180)
      context.scale(at.scale * (at.flipHorizontal ? -1 : 1), at.scale * (at.flipVertical ? -1 : 1))
      context.drawImage(picture, -own.width / 2, -own.height / 2, own.width, own.height)
      context.restore()
    }
  return sheet
}

/** A layer's soft visible mask, 0 to 1. */
async function cover({ mask }: LayerPlan, { width, height }: Extent): Promise<Float32Array> {
  const context = blank(width, height).getContext("2d") as CanvasRenderingContext2D
  context.drawImage(await bitmap(mask?.sha256 ?? ""), 0, 0, width, height)
  const { data } = context.getImageData(0, 0, width, height)
  return Float32Array.from({ length: width * height }, (_, at) => (data[4 * at] as number) / 255)
}

/** A layer's soft visible mask in one colour. */
async function masked(
  { mask }: LayerPlan,
  colour: string,
  opacity: number,
  width: number,
  height: number,
): Promise<HTMLCanvasElement> {
  const sheet = blank(width, height)
  const context = sheet.getContext("2d") as CanvasRenderingContext2D
  context.drawImage(await bitmap(mask?.sha256 ?? ""), 0, 0, width, height)
  const pixels = context.getImageData(0, 0, width, height)
  const paint = blank(1, 1).getContext("2d") as CanvasRenderingContext2D
  paint.fillStyle = colour
  paint.fillRect(0, 0, 1, 1)
  const [red = 0, green = 0, blue = 0] = paint.getImageData(0, 0, 1, 1).data
  for (let i = 0; i < pixels.data.length; i += 4) {
    const alpha = pixels.data[i] as number
    pixels.data.set([red, green, blue, alpha * opacity], i)
  }
  context.putImageData(pixels, 0, 0)
  return sheet
}

function blank(width: number, height: number): HTMLCanvasElement {
  const canvas = document.createElement("canvas")
  canvas.width = width
  canvas.height = height
  return canvas
}
