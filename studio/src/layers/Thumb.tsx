import { useEffect, useRef } from "react"
import { type Piece, pictureOf, placement } from "../document"
import { levelFor, usePictures } from "../pictures"
import { useStudio } from "../store"

const SIDE = 36

/** A layer's picture, small, mirrored and turned as it lies. */
export function Thumb({ piece }: { piece: Piece }) {
  const canvas = useRef<HTMLCanvasElement>(null)
  const digest = pictureOf(piece.layer)
  const pixels = usePictures((state) => state.pixels.get(digest))
  const { transform } = piece.layer
  // biome-ignore lint/correctness/useExhaustiveDependencies: of the layer only its transform shows here
  useEffect(() => {
    const element = canvas.current
    const context = element?.getContext("2d")
    if (!element || !context) return
    const ratio = Math.min(window.devicePixelRatio || 1, 3)
    const side = SIDE * ratio
    element.width = side
    element.height = side
    if (!pixels) return
    const at = placement(piece.layer, useStudio.getState().document.size)
    const { width, height } = pixels
    const scale = (0.92 * side) / Math.max(width, height)
    context.imageSmoothingQuality = "high"
    context.translate(side / 2, side / 2)
    context.rotate((at.rotation * Math.PI) / 180)
    context.scale(at.flipHorizontal ? -scale : scale, at.flipVertical ? -scale : scale)
    context.drawImage(levelFor(pixels, scale), -width / 2, -height / 2, width, height)
  }, [pixels, transform])
  return <canvas ref={canvas} className="thumb" />
}
