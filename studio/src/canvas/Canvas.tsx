// The canvas region: the stage, and every way a hand, a pen or a file comes to it.

import type Konva from "konva"
import { type RefObject, useEffect, useRef, useState } from "react"
import { Group, Layer, Rect, Shape, Stage, Transformer } from "react-konva"
import { fetchArt } from "../art"
import type { Extent } from "../document"
import { useShown } from "../draw/shown"
import { addFiles, filesOf } from "../intake"
import { BrushCursor } from "../mask/BrushCursor"
import { CropFrame } from "../mask/CropFrame"
import { Marks } from "../mask/Marks"
import { useModel } from "../models"
import { usePictures } from "../pictures"
import { useDocument, useStudio } from "../store"
import { useColours } from "../ui/useColours"
import { tell } from "../voice"
import { words } from "../words"
import { draggedArt } from "./Art"
import { isTyping } from "./keys"
import { OverlayNode, usePlanMark } from "./OverlayNode"
import { PieceNode } from "./PieceNode"
import { useHand } from "./useHand"
import { useTransforms } from "./useTransforms"
import { paper, showAll, toView, useDesk, useView } from "./view"

const CORNERS = ["top-left", "top-right", "bottom-left", "bottom-right"]
const TURNS = [0, 45, 90, 135, 180, 225, 270, 315]
const coarse = globalThis.matchMedia?.("(pointer: coarse)").matches ?? false

export interface Nodes {
  readonly stage: RefObject<Konva.Stage | null>
  readonly view: RefObject<Konva.Group | null>
  /** What lies over all layers and moves with them. */
  readonly over: RefObject<Konva.Group | null>
  readonly transformer: RefObject<Konva.Transformer | null>
  readonly guides: RefObject<Konva.Shape | null>
  readonly marquee: RefObject<Konva.Rect | null>
}

export function Canvas() {
  const region = useRef<HTMLDivElement>(null)
  const nodes: Nodes = {
    stage: useRef<Konva.Stage>(null),
    view: useRef<Konva.Group>(null),
    over: useRef<Konva.Group>(null),
    transformer: useRef<Konva.Transformer>(null),
    guides: useRef<Konva.Shape>(null),
    marquee: useRef<Konva.Rect>(null),
  }
  const { size, pieces } = useDocument()
  const extent = useView((view) => view.region)
  const overlay = useDesk((desk) => desk.overlay)
  const tool = useDesk((desk) => desk.tool)
  const colours = useColours()
  useRegion(region, size)
  useFollow(nodes)
  usePlanMark()
  useHand(region, nodes)
  const transforms = useTransforms(nodes)
  const isOver = useFiles(region)
  return (
    <div
      ref={region}
      className={isOver ? "stage over" : "stage"}
      role="application"
      aria-label={words.canvas.name}
      aria-describedby="canvas-help"
      data-tool={tool}
      // biome-ignore lint/a11y/noNoninteractiveTabindex: it takes the keys of an application
      tabIndex={0}
    >
      <p id="canvas-help" className="unseen">
        {words.canvas.help}
      </p>
      {extent.width > 0 && (
        <Stage ref={nodes.stage} width={extent.width} height={extent.height}>
          <Layer listening={false}>
            <Group ref={nodes.view}>
              <Paper size={size} />
              {pieces.map((piece) => (
                <PieceNode key={piece.id} piece={piece} size={size} />
              ))}
              {overlay !== "none" && <OverlayNode size={size} kind={overlay} />}
              <Surround size={size} colour={colours.ground} line={colours["line-strong"]} />
            </Group>
          </Layer>
          <Layer>
            <Shape
              ref={nodes.guides}
              listening={false}
              stroke={colours.accent}
              strokeWidth={1}
              visible={false}
            />
            <Rect
              ref={nodes.marquee}
              listening={false}
              visible={false}
              stroke={colours.accent}
              strokeWidth={1}
              dash={[4, 3]}
            />
            <Group ref={nodes.over}>
              {tool === "crop" && <CropFrame colours={colours} coarse={coarse} />}
              {tool === "select" && <Marks colours={colours} />}
            </Group>
            <Transformer
              ref={nodes.transformer}
              visible={tool === "move"}
              keepRatio
              flipEnabled={false}
              enabledAnchors={CORNERS}
              rotationSnaps={TURNS}
              rotationSnapTolerance={4}
              rotateAnchorOffset={coarse ? 36 : 26}
              anchorSize={coarse ? 18 : 10}
              anchorCornerRadius={2}
              anchorStroke={colours.accent}
              anchorFill={colours.surface}
              borderStroke={colours.accent}
              anchorStyleFunc={(anchor) => anchor.hitStrokeWidth(coarse ? 28 : 12)}
              onTransformStart={transforms.start}
              onTransformEnd={transforms.end}
            />
          </Layer>
        </Stage>
      )}
      <BrushCursor region={region} />
      {overlay === "none" && <Laid size={size} />}
      {pieces.length === 0 && <p className="empty">{words.canvas.empty}</p>}
      {isOver && <p className="drop">{words.canvas.drop}</p>}
    </div>
  )
}

/** What lies under all layers. */
function Paper({ size }: { size: Extent }) {
  const { kind } = useDocument().background
  const digest =
    kind.case === "image" && kind.value.source.case === "blob" ? kind.value.source.value.sha256 : ""
  const pixels = usePictures((state) => state.pixels.get(digest))
  const { red, green, blue } =
    kind.case === "color" ? kind.value : { red: 150, green: 150, blue: 150 }
  return (
    <>
      <Rect {...size} fill={`rgb(${red} ${green} ${blue})`} />
      {pixels && (
        <Shape
          {...size}
          sceneFunc={(context: Konva.Context) =>
            context.drawImage(pixels.levels[0] as CanvasImageSource, 0, 0, size.width, size.height)
          }
        />
      )}
    </>
  )
}

/** The picture that drawing lays over the collage. */
function Laid({ size }: { size: Extent }) {
  const { picture, kind } = useShown()
  const view = useView()
  if (!picture) return null
  return <img className={`laid ${kind}`} src={picture} alt="" style={paper(view, size)} />
}

/** Dims what lies beyond the canvas: it can be reached, and is not drawn. */
function Surround({ size, colour, line }: { size: Extent; colour: string; line: string }) {
  return (
    <Shape
      sceneFunc={(context: Konva.Context, shape: Konva.Shape) => {
        const { width, height } = size
        const far = 64 * Math.max(width, height)
        const plain = context._context
        plain.save()
        plain.globalAlpha = 0.82
        plain.fillStyle = colour
        plain.beginPath()
        plain.rect(-far, -far, 2 * far + width, 2 * far + height)
        plain.rect(0, 0, width, height)
        plain.fill("evenodd")
        plain.restore()
        plain.strokeStyle = line
        plain.lineWidth = 1 / shape.getAbsoluteScale().x
        plain.strokeRect(0, 0, width, height)
      }}
    />
  )
}

/** Tells the view how large the region is, and keeps the canvas in it while it is fitted. */
function useRegion(region: RefObject<HTMLDivElement | null>, size: Extent): void {
  useEffect(() => {
    const element = region.current as HTMLDivElement
    const observer = new ResizeObserver(() => {
      const { clientWidth: width, clientHeight: height } = element
      useView.setState({ region: { width, height } })
      if (useView.getState().isFitted) showAll(useStudio.getState().document.size)
    })
    observer.observe(element)
    return () => observer.disconnect()
  }, [region])
  // biome-ignore lint/correctness/useExhaustiveDependencies: another canvas is shown whole
  useEffect(() => showAll(size), [size.width, size.height])
}

/** Moves the drawn view with the view: konva alone, no render. */
function useFollow({ view, over, transformer }: Nodes): void {
  const hasStage = useView((state) => state.region.width > 0)
  const selection = useStudio((state) => state.selection)
  const { pieces } = useDocument()
  const pixels = usePictures((state) => state.pixels)
  useEffect(() => {
    if (!hasStage) return
    const follow = () => {
      const { x, y, scale } = useView.getState()
      for (const group of [view.current, over.current])
        group?.setAttrs({ x, y, scaleX: scale, scaleY: scale })
      transformer.current?.forceUpdate()
    }
    follow()
    return useView.subscribe(follow)
  }, [hasStage, view, over, transformer])
  // biome-ignore lint/correctness/useExhaustiveDependencies: nodes come and go with pieces and their pixels
  useEffect(() => {
    const group = view.current
    if (!group) return
    const chosen = pieces.filter(
      ({ id, locked, layer }) => selection.includes(id) && !locked && layer.visible !== false,
    )
    transformer.current?.nodes(
      chosen.map(({ id }) => group.findOne(`#${id}`)).filter((node) => node !== undefined),
    )
  }, [selection, pieces, pixels, hasStage])
}

/** Dropped and pasted pictures become layers. Answers whether something is held over the region. */
function useFiles(region: RefObject<HTMLDivElement | null>): boolean {
  const [isOver, setOver] = useState(false)
  const model = useModel()
  const limit = model?.maxLayers || undefined
  useEffect(() => {
    const element = region.current as HTMLDivElement
    const over = (event: DragEvent) => {
      event.preventDefault()
      if (event.dataTransfer) event.dataTransfer.dropEffect = "copy"
      setOver(true)
    }
    const leave = (event: DragEvent) => {
      if (!element.contains(event.relatedTarget as Node | null)) setOver(false)
    }
    const drop = (event: DragEvent) => {
      event.preventDefault()
      setOver(false)
      const box = element.getBoundingClientRect()
      const at = toView({ x: event.clientX - box.left, y: event.clientY - box.top })
      const piece = draggedArt(event.dataTransfer)
      const files = filesOf(event.dataTransfer)
      if (piece) void fetchArt(piece).then((file) => addFiles([file], { at, limit }))
      else if (files.length) void addFiles(files, { at, limit })
      else tell(words.errors.notPictures, "error")
    }
    // Elsewhere on the page a dropped file would replace the page.
    const refuse = (event: DragEvent) => event.preventDefault()
    const paste = (event: ClipboardEvent) => {
      const files = filesOf(event.clipboardData)
      if (files.length === 0) {
        if (!isTyping(event.target)) tell(words.errors.notPictures)
        return
      }
      event.preventDefault()
      void addFiles(files, { limit })
    }
    element.addEventListener("dragover", over)
    element.addEventListener("dragleave", leave)
    element.addEventListener("drop", drop)
    window.addEventListener("dragover", refuse)
    window.addEventListener("drop", refuse)
    window.addEventListener("paste", paste)
    return () => {
      element.removeEventListener("dragover", over)
      element.removeEventListener("dragleave", leave)
      element.removeEventListener("drop", drop)
      window.removeEventListener("dragover", refuse)
      window.removeEventListener("drop", refuse)
      window.removeEventListener("paste", paste)
    }
  }, [region, limit])
  return isOver
}
