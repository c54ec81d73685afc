import { Circle, Group, Line } from "react-konva"
import { useView } from "../canvas/view"
import { pictureOf } from "../document"
import { usePictures } from "../pictures"
import { useDocument } from "../store"
import type { Colours } from "../ui/useColours"
import { onCanvas, useSelecting } from "./selecting"

// Screen pixels.
const RADIUS = 7

/** What was pointed at, on the canvas: filled where it is meant, with a minus where it is not. */
export function Marks({ colours }: { colours: Colours }) {
  const { id, shown, marks } = useSelecting()
  const scale = useView((view) => view.scale)
  const { pieces, size } = useDocument()
  const piece = pieces.find((each) => each.id === id)
  const pixels = usePictures((state) => piece && state.pixels.get(pictureOf(piece.layer)))
  if (!piece || !pixels || pictureOf(piece.layer) !== shown) return null
  const unit = 1 / scale
  return marks.map((mark, number) => (
    <Group
      // biome-ignore lint/suspicious/noArrayIndexKey: marks are only added, and two may be equal
      key={number}
      {...onCanvas(mark, piece, size, pixels)}
      scaleX={unit}
      scaleY={unit}
      listening={false}
    >
      <Circle
        radius={RADIUS}
        fill={mark.outside ? colours.surface : colours.accent}
        stroke={mark.outside ? colours.accent : colours.surface}
        strokeWidth={2}
      />
      {mark.outside && <Line points={[-3.5, 0, 3.5, 0]} stroke={colours.accent} strokeWidth={2} />}
    </Group>
  ))
}
