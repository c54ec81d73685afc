import Konva from "konva"
import { Shape } from "react-konva"
import { type Extent, type Piece, pictureOf, placement } from "../document"
import { paintedOver } from "../mask/painted"
import { levelFor, usePictures } from "../pictures"

/** One layer's picture where the compositor will place it. It draws nothing until its pixels are there. */
export function PieceNode({ piece, size }: { piece: Piece; size: Extent }) {
  const pixels = usePictures((state) => state.pixels.get(pictureOf(piece.layer)))
  if (!pixels) return null
  const { layer } = piece
  const { flipHorizontal, flipVertical, ...at } = placement(layer, size)
  const { width, height } = pixels
  return (
    <Shape
      id={piece.id}
      name="piece"
      x={at.x}
      y={at.y}
      scaleX={at.scale}
      scaleY={at.scale}
      rotation={at.rotation}
      width={width}
      height={height}
      offsetX={width / 2}
      offsetY={height / 2}
      opacity={layer.opacity ?? 1}
      visible={layer.visible !== false}
      listening={false}
      perfectDrawEnabled={false}
      sceneFunc={(context: Konva.Context, shape: Konva.Shape) => {
        // The mirror is inside, so that handles never see a negative scale.
        context.translate(flipHorizontal ? width : 0, flipVertical ? height : 0)
        context.scale(flipHorizontal ? -1 : 1, flipVertical ? -1 : 1)
        const ratio = shape.getLayer()?.getCanvas().getPixelRatio() ?? 1
        const scale = shape.getAbsoluteScale().x * ratio
        context.drawImage(paintedOver(piece.id) ?? levelFor(pixels, scale), 0, 0, width, height)
      }}
    />
  )
}

/** Draws layers anew whose pictures changed under the brush. */
export function redrawPieces(): void {
  for (const stage of Konva.stages) stage.getLayers()[0]?.batchDraw()
}
