// What does not move, flattened while something else does: a drag then draws three pictures a frame, not all layers.

import Konva from "konva"
import { SceneCanvas } from "konva/lib/Canvas.js"
import { useView } from "./view"

type Drawn = Konva.Shape | Konva.Group

/** Flattens the children of `group` that are not `moving`; the answer undoes it. */
export function freeze(group: Konva.Group, moving: readonly Konva.Node[]): () => void {
  let melt = flatten(group, moving)
  // Flattened pictures are of one view.
  const leave = useView.subscribe(() => {
    melt()
    melt = flatten(group, moving)
  })
  return () => {
    leave()
    melt()
  }
}

function flatten(group: Konva.Group, moving: readonly Konva.Node[]): () => void {
  const runs: Drawn[][] = [[]]
  for (const child of group.getChildren() as Drawn[]) {
    if (moving.includes(child)) runs.push([])
    else if (child.visible()) runs.at(-1)?.push(child)
  }
  const undo = runs.filter((run) => run.length > 1).map((run) => replace(group, run))
  return () => {
    for (const each of undo) each()
  }
}

/** One picture in place of neighbours, of this view's pixels. */
function replace(group: Konva.Group, run: readonly Drawn[]): () => void {
  const own = group.getLayer()?.getCanvas()
  const [first] = run
  if (!own || !first) return () => {}
  const flat = new SceneCanvas({
    width: own.getWidth(),
    height: own.getHeight(),
    pixelRatio: own.getPixelRatio(),
  })
  for (const node of run) node.drawScene(flat)
  const shape = new Konva.Shape({
    listening: false,
    perfectDrawEnabled: false,
    sceneFunc: ({ _context: context }) => {
      context.save()
      context.setTransform(1, 0, 0, 1, 0, 0)
      context.drawImage(flat._canvas, 0, 0)
      context.restore()
    },
  })
  const place = first.zIndex()
  group.add(shape)
  shape.zIndex(place)
  for (const node of run) node.visible(false)
  return () => {
    shape.destroy()
    for (const node of run) node.visible(true)
  }
}
