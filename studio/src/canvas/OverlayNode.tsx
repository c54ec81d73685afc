import type Konva from "konva"
import { useEffect } from "react"
import { Shape } from "react-konva"
import { create } from "zustand"
import type { Extent } from "../document"
import type { LayerPlan } from "../gen/collage/v1/collage_pb"
import type { Plan } from "../gen/collage/v1/collage_service_pb"
import { usePlan } from "../plan"
import { download } from "../server"
import { useDocument } from "../store"
import { type Overlay, useDesk } from "./view"

/** The overlay as it is painted, and what it is of. */
export const usePainted = create<{ picture?: CanvasImageSource; plan?: Plan; kind?: Overlay }>()(
  () => ({}),
)

/** What the newest plan shows of the collage, over it. */
export function OverlayNode({ size, kind }: { size: Extent; kind: Overlay }) {
  const plan = usePlan((state) => state.plan)
  const painted = usePainted()
  // What is of an older plan stays until the new one is painted, but another overlay never shows in its place.
  const picture = plan && painted.kind === kind ? painted.picture : undefined
  useEffect(() => {
    if (!plan) return
    let isOld = false
    paint(plan, size, kind)
      .then((picture) => isOld || usePainted.setState({ picture, plan, kind }))
      // The next plan brings another.
      .catch(() => {})
    return () => {
      isOld = true
    }
  }, [plan, size, kind])
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
  { width, height }: Extent,
  kind: Overlay,
): Promise<CanvasImageSource> {
  if (kind === "composite") return bitmap(composite?.sha256 ?? "")
  const sheet = blank(width, height)
  const context = sheet.getContext("2d") as CanvasRenderingContext2D
  if (kind === "masks") {
    for (const [index, layer] of layers.entries())
      context.drawImage(await masked(layer, tint(index), 0.6, width, height), 0, 0)
    return sheet
  }
  context.fillStyle = "#000"
  context.fillRect(0, 0, width, height)
  // Strength where each layer shows; what no layer covers is drawn freely.
  if (kind === "noise") {
    context.fillStyle = "#fff"
    context.fillRect(0, 0, width, height)
    for (const layer of layers) {
      const grey = Math.round(layer.noise * 255)
      context.drawImage(await masked(layer, `rgb(${grey} ${grey} ${grey})`, 1, width, height), 0, 0)
    }
    return sheet
  }
  context.globalCompositeOperation = "lighter"
  for (const { structure } of layers)
    for (const { image } of structure)
      if (image?.source.case === "blob")
        context.drawImage(await bitmap(image.source.value.sha256), 0, 0, width, height)
  return sheet
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
