// Pointers on the canvas: selecting, dragging, the marquee, panning and zooming. While something moves only konva's nodes do;
// the document changes once, when it is let go.

import { createUseGesture, pinchAction, wheelAction } from "@use-gesture/react"
import type Konva from "konva"
import { type RefObject, useEffect, useRef } from "react"
import { saySelection } from "../acts"
import { type Piece, pictureOf, placement } from "../document"
import { strokeOn } from "../mask/brush"
import { pointAt } from "../mask/selecting"
import { usePictures } from "../pictures"
import { useStudio } from "../store"
import { words } from "../words"
import type { Nodes } from "./Canvas"
import { freeze } from "./freeze"
import { around, type Box, boxOf, hits, overlap, type Point } from "./geometry"
import { isTyping } from "./keys"
import { redrawPieces } from "./PieceNode"
import { type Guide, snap, targets } from "./snap"
import { commit } from "./useTransforms"
import { pan, toView, useDesk, useView, zoom } from "./view"

const useGesture = createUseGesture([pinchAction, wheelAction])

// Screen pixels: what moves less is a click, and what is nearer is caught.
const SLACK = 3
const REACH = 6

/** What a pointer that went down does until it comes up. */
interface Gesture {
  move(event: PointerEvent): void
  end(event: PointerEvent): void
  cancel(): void
}

export function useHand(region: RefObject<HTMLDivElement | null>, nodes: Nodes): void {
  const gesture = useRef<{ pointer: number; does: Gesture } | undefined>(undefined)
  // biome-ignore lint/correctness/useExhaustiveDependencies: nodes are refs
  useEffect(() => {
    const element = region.current as HTMLDivElement
    let isSpace = false
    const touches = new Map<number, Point>()
    const point = (event: { clientX: number; clientY: number }) => {
      const box = element.getBoundingClientRect()
      return { x: event.clientX - box.left, y: event.clientY - box.top }
    }
    const drop = () => {
      gesture.current?.does.cancel()
      gesture.current = undefined
    }
    const down = (event: PointerEvent) => {
      if (event.pointerType === "touch") touches.set(event.pointerId, point(event))
      // Two fingers pan and zoom; what one of them began is as if it had not been.
      if (touches.size > 1) {
        element.setPointerCapture(event.pointerId)
        return drop()
      }
      if (gesture.current || event.button === 2) return
      const at = point(event)
      const does = begin(event, at, isSpace, nodes, point)
      if (!does) return
      element.setPointerCapture(event.pointerId)
      gesture.current = { pointer: event.pointerId, does }
    }
    const move = (event: PointerEvent) => {
      if (touches.has(event.pointerId)) {
        const before = spread(touches)
        touches.set(event.pointerId, point(event))
        const after = spread(touches)
        if (before && after) {
          pan(after.at.x - before.at.x, after.at.y - before.at.y)
          if (before.distance > 0) zoom(after.distance / before.distance, after.at)
          return
        }
      }
      if (gesture.current?.pointer === event.pointerId) gesture.current.does.move(event)
    }
    const up = (event: PointerEvent) => {
      touches.delete(event.pointerId)
      if (gesture.current?.pointer !== event.pointerId) return
      gesture.current.does.end(event)
      gesture.current = undefined
    }
    const lost = (event: PointerEvent) => {
      touches.delete(event.pointerId)
      if (gesture.current?.pointer === event.pointerId) drop()
    }
    const keydown = (event: KeyboardEvent) => {
      if (event.key === "Escape") drop()
      const isHere = event.target === document.body || event.target === element
      if (event.key === " " && isHere && !isTyping(event.target)) {
        isSpace = true
        element.dataset.pans = ""
        event.preventDefault()
      }
    }
    const keyup = (event: KeyboardEvent) => {
      if (event.key !== " ") return
      isSpace = false
      delete element.dataset.pans
    }
    element.addEventListener("pointerdown", down)
    element.addEventListener("pointermove", move)
    element.addEventListener("pointerup", up)
    element.addEventListener("pointercancel", lost)
    window.addEventListener("keydown", keydown)
    window.addEventListener("keyup", keyup)
    return () => {
      element.removeEventListener("pointerdown", down)
      element.removeEventListener("pointermove", move)
      element.removeEventListener("pointerup", up)
      element.removeEventListener("pointercancel", lost)
      window.removeEventListener("keydown", keydown)
      window.removeEventListener("keyup", keyup)
    }
  }, [region])

  useGesture(
    {
      // Of a trackpad: fingers on a screen are pointers, above.
      onPinch: ({ origin: [x, y], first, movement: [scale], memo, event, touches }) => {
        const box = region.current?.getBoundingClientRect()
        if (!box || (touches > 1 && !event.type.startsWith("gesture"))) return 1
        const at = { x: x - box.left, y: y - box.top }
        if (event instanceof WheelEvent) zoom(Math.exp(-event.deltaY / 200), at)
        else zoom(scale / (first ? 1 : (memo ?? 1)), at)
        return scale
      },
      onWheel: ({ event, ctrlKey, last }) => {
        if (ctrlKey || last) return
        if (isTrackpad(event)) pan(-event.deltaX, -event.deltaY)
        else if (event.shiftKey) pan(-(event.deltaX || event.deltaY), 0)
        else zoom(Math.exp(-steps(event) / 4), point(event))
      },
    },
    {
      target: region,
      eventOptions: { passive: false },
      pinch: { preventDefault: true },
      wheel: { preventDefault: true },
    },
  )
  function point(event: WheelEvent): Point {
    const box = (region.current as HTMLDivElement).getBoundingClientRect()
    return { x: event.clientX - box.left, y: event.clientY - box.top }
  }
}

/** Between the first two fingers: their middle and how far they are apart. */
function spread(touches: ReadonlyMap<number, Point>) {
  const [one, other] = touches.values()
  if (!one || !other) return undefined
  return {
    at: { x: (one.x + other.x) / 2, y: (one.y + other.y) / 2 },
    distance: Math.hypot(one.x - other.x, one.y - other.y),
  }
}

// Two fingers on a trackpad scroll in fine steps and sideways; a wheel has notches.
function isTrackpad({ deltaMode, deltaX, deltaY, shiftKey }: WheelEvent): boolean {
  return deltaMode === 0 && !shiftKey && (deltaX !== 0 || Math.abs(deltaY) < 40)
}

function steps({ deltaMode, deltaY }: WheelEvent): number {
  const notches = deltaMode === 0 ? deltaY / 100 : deltaMode === 1 ? deltaY / 3 : deltaY
  return Math.min(Math.max(notches, -4), 4)
}

function begin(
  event: PointerEvent,
  at: Point,
  isSpace: boolean,
  nodes: Nodes,
  point: (event: PointerEvent) => Point,
): Gesture | undefined {
  const { tool } = useDesk.getState()
  if (isSpace || event.button === 1) return panning(at, point)
  // Handles are konva's own.
  if (nodes.stage.current?.getIntersection(at)) return undefined
  if (tool === "brush" || tool === "eraser")
    return strokeOn(event, (each) => toView(point(each)), redrawPieces)
  if (tool === "crop") return undefined
  if (tool === "select")
    return panning(at, point, () => pointAt(toView(at), event.altKey || event.shiftKey))
  const hit = pieceAt(toView(at))
  const { selection, select } = useStudio.getState()
  if (hit) {
    if (event.shiftKey) {
      select(
        selection.includes(hit.id)
          ? selection.filter((id) => id !== hit.id && !(hit.group && groupOf(id) === hit.group))
          : [...selection, hit.id],
      )
      saySelection()
    } else if (!selection.includes(hit.id)) {
      select([hit.id])
      saySelection()
    }
    useDesk.setState({ tab: "layer" })
    return dragging(hit, at, nodes, point, () => select(selection))
  }
  return event.pointerType === "touch"
    ? panning(at, point, () => select([]))
    : marquee(at, event.shiftKey, nodes, point)
}

const groupOf = (id: string) =>
  useStudio.getState().document.pieces.find((piece) => piece.id === id)?.group

/** The front piece that shows at a point of the canvas and can be taken. */
export function pieceAt(point: Point): Piece | undefined {
  const { pieces, size } = useStudio.getState().document
  const { pixels } = usePictures.getState()
  return pieces.findLast(({ layer, locked }) => {
    const own = pixels.get(pictureOf(layer))
    return own && !locked && layer.visible !== false && hits(point, placement(layer, size), own)
  })
}

function boxOfPiece({ layer }: Piece): Box | undefined {
  const pixels = usePictures.getState().pixels.get(pictureOf(layer))
  return pixels && boxOf(placement(layer, useStudio.getState().document.size), pixels)
}

function panning(from: Point, point: (event: PointerEvent) => Point, click?: () => void): Gesture {
  let last = from
  let far = 0
  return {
    move(event) {
      const now = point(event)
      far = Math.max(far, Math.hypot(now.x - from.x, now.y - from.y))
      pan(now.x - last.x, now.y - last.y)
      last = now
    },
    end: () => far <= SLACK && click?.(),
    cancel: () => {},
  }
}

function dragging(
  hit: Piece,
  from: Point,
  { view, guides }: Nodes,
  point: (event: PointerEvent) => Point,
  unselect: () => void,
): Gesture {
  const { document, selection, select } = useStudio.getState()
  const moving = document.pieces.filter(({ id, locked }) => selection.includes(id) && !locked)
  const starts = moving.map(({ layer }) => placement(layer, document.size))
  const found = moving.map(({ id }) => view.current?.findOne(`#${id}`))
  const box = around(moving.map(boxOfPiece).filter((each) => each !== undefined))
  const places = targets(
    document.size,
    document.pieces
      .filter((piece) => !moving.includes(piece) && piece.layer.visible !== false)
      .map(boxOfPiece)
      .filter((each) => each !== undefined),
  )
  let isMoved = false
  let melt = () => {}
  const put = (right: number, down: number) =>
    found.forEach((node, index) => {
      const start = starts[index]
      if (start) node?.position({ x: start.x + right, y: start.y + down })
    })
  const nodes = found.filter((node) => node !== undefined)
  const done = () => {
    melt()
    showGuides(guides.current, [])
  }
  return {
    move(event) {
      const now = point(event)
      if (!isMoved) {
        if (Math.hypot(now.x - from.x, now.y - from.y) <= SLACK) return
        isMoved = true
        if (view.current) melt = freeze(view.current, nodes)
      }
      const { scale } = useView.getState()
      let right = (now.x - from.x) / scale
      let down = (now.y - from.y) / scale
      // Shift keeps to one axis; control lets it stand anywhere.
      if (event.shiftKey && Math.abs(right) > Math.abs(down)) down = 0
      else if (event.shiftKey) right = 0
      const lines: Guide[] = []
      if (box && !event.ctrlKey && !event.metaKey) {
        const moved = {
          left: box.left + right,
          right: box.right + right,
          top: box.top + down,
          bottom: box.bottom + down,
        }
        const caught = snap(moved, places, REACH / scale)
        right += caught.right
        down += caught.down
        lines.push(...caught.guides)
      }
      put(right, down)
      showGuides(guides.current, lines)
    },
    end(event) {
      done()
      if (isMoved)
        commit(nodes, words.edits.move(words.names(moving.map(({ layer }) => layer.name))))
      // A click on one of many selected picks it alone.
      else if (!event.shiftKey && selection.length > 1 && selection.includes(hit.id))
        select([hit.id])
    },
    cancel() {
      done()
      put(0, 0)
      unselect()
    },
  }
}

function showGuides(shape: Konva.Shape | null, lines: readonly Guide[]): void {
  if (!shape) return
  if (lines.length === 0) {
    if (shape.visible()) shape.visible(false)
    return
  }
  const { x, y, scale, region } = useView.getState()
  shape.sceneFunc((context) => {
    context.beginPath()
    for (const { axis, at } of lines) {
      const here = Math.round(axis === "x" ? x + at * scale : y + at * scale) + 0.5
      context.moveTo(axis === "x" ? here : 0, axis === "x" ? 0 : here)
      context.lineTo(axis === "x" ? here : region.width, axis === "x" ? region.height : here)
    }
    context.strokeShape(shape)
  })
  shape.visible(true)
}

function marquee(
  from: Point,
  adds: boolean,
  nodes: Nodes,
  point: (event: PointerEvent) => Point,
): Gesture {
  const rect = nodes.marquee.current
  const before = adds ? useStudio.getState().selection : []
  let last = from
  const isDrawn = () => Math.hypot(last.x - from.x, last.y - from.y) > SLACK
  return {
    move(event) {
      last = point(event)
      rect?.setAttrs({
        x: Math.min(from.x, last.x) + 0.5,
        y: Math.min(from.y, last.y) + 0.5,
        width: Math.abs(last.x - from.x),
        height: Math.abs(last.y - from.y),
        visible: isDrawn(),
      })
    },
    end() {
      rect?.visible(false)
      const { document, select } = useStudio.getState()
      const one = toView(from)
      const other = toView(last)
      const box = {
        left: Math.min(one.x, other.x),
        top: Math.min(one.y, other.y),
        right: Math.max(one.x, other.x),
        bottom: Math.max(one.y, other.y),
      }
      const caught = isDrawn()
        ? document.pieces.filter((piece) => {
            const own = boxOfPiece(piece)
            return own && !piece.locked && piece.layer.visible !== false && overlap(own, box)
          })
        : []
      select([...new Set([...before, ...caught.map(({ id }) => id)])])
      saySelection()
    },
    cancel: () => rect?.visible(false),
  }
}
