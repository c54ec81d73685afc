import type Konva from "konva"
import { useEffect, useRef } from "react"
import { Rect, Transformer } from "react-konva"
import { toPicture } from "../canvas/geometry"
import { pictureOf, placement } from "../document"
import { usePictures } from "../pictures"
import { useDocument } from "../store"
import type { Colours } from "../ui/useColours"
import { cropped, useCropping, within } from "./cropping"

/** The crop's rectangle, on the canvas: it lies as the layer does. */
export function CropFrame({ colours, coarse }: { colours: Colours; coarse: boolean }) {
  const { id, box } = useCropping()
  const { pieces, size } = useDocument()
  const piece = pieces.find((each) => each.id === id)
  const pixels = usePictures((state) => piece && state.pixels.get(pictureOf(piece.layer)))
  const rect = useRef<Konva.Rect>(null)
  const handles = useRef<Konva.Transformer>(null)
  const isShown = piece !== undefined && pixels !== undefined
  useEffect(() => {
    if (isShown && rect.current) handles.current?.nodes([rect.current])
  }, [isShown])
  if (!piece || !pixels) return null
  const at = placement(piece.layer, size)
  const width = box.right - box.left
  const height = box.bottom - box.top
  const settle = () => {
    const node = rect.current
    if (!node) return
    const centre = toPicture({ x: node.x(), y: node.y() }, at, pixels)
    const across = (node.width() * node.scaleX()) / at.scale / 2
    const down = (node.height() * node.scaleY()) / at.scale / 2
    node.scale({ x: at.scale, y: at.scale })
    const next = within(
      {
        left: centre.x - across,
        right: centre.x + across,
        top: centre.y - down,
        bottom: centre.y + down,
      },
      pixels,
    )
    node.setAttrs({
      ...cropped(next, at, pixels),
      width: next.right - next.left,
      height: next.bottom - next.top,
      offsetX: (next.right - next.left) / 2,
      offsetY: (next.bottom - next.top) / 2,
    })
    useCropping.setState({ box: next })
  }
  return (
    <>
      <Rect
        ref={rect}
        {...cropped(box, at, pixels)}
        width={width}
        height={height}
        offsetX={width / 2}
        offsetY={height / 2}
        scaleX={at.scale}
        scaleY={at.scale}
        rotation={at.rotation}
        stroke={colours.accent}
        strokeWidth={2}
        strokeScaleEnabled={false}
        dash={[6, 4]}
        draggable
        onDragEnd={settle}
        onTransformEnd={settle}
      />
      <Transformer
        ref={handles}
        rotateEnabled={false}
        keepRatio={false}
        flipEnabled={false}
        ignoreStroke
        anchorSize={coarse ? 18 : 10}
        anchorCornerRadius={2}
        anchorStroke={colours.accent}
        anchorFill={colours.surface}
        borderEnabled={false}
        anchorStyleFunc={(anchor) => anchor.hitStrokeWidth(coarse ? 28 : 12)}
      />
    </>
  )
}
