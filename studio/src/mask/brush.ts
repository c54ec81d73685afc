// The brush and the eraser: strokes on a layer's own picture, seen as they are made, a new picture when they end.
//
// The eraser takes alpha away. The brush gives back what was there: the picture as it was before anything was cut from it.

import { act, saySelection } from "../acts"
import { hits, type Point, toPicture } from "../canvas/geometry"
import { useDesk } from "../canvas/view"
import { type Piece, type Placement, pictureOf, placement } from "../document"
import { replacePicture } from "../edits"
import { addPicture, load, type Pixels, usePictures } from "../pictures"
import { selectedPieces, useStudio } from "../store"
import { say, tell } from "../voice"
import { words } from "../words"
import { paintedOver, showPainted } from "./painted"
import { band, type Dab, reach, width } from "./stroke"
import { surface, toPng } from "./surface"

/** The brush's diameter, canvas pixels. */
export function diameter(): number {
  const { size } = useStudio.getState().document
  return (useDesk.getState().brush / 100) * Math.min(size.width, size.height)
}

/** The selected layer; where none is, the front one under the brush. */
function target(point: Point): Piece | undefined {
  const { document, select } = useStudio.getState()
  const chosen = selectedPieces(useStudio.getState())
  if (chosen.length === 1) return chosen[0]
  const { pixels } = usePictures.getState()
  const under = document.pieces.findLast(({ layer }) => {
    const own = pixels.get(pictureOf(layer))
    return own && layer.visible !== false && hits(point, placement(layer, document.size), own)
  })
  if (under) {
    select([under.id])
    saySelection()
  } else say(words.mask.chooseOne)
  return under
}

/** A stroke by a pointer, from where it went down. `at` gives an event's place on the canvas. */
export function strokeOn(
  first: PointerEvent,
  at: (event: PointerEvent) => Point,
  redraw: (id: string) => void,
) {
  const stroke = begin(at(first), redraw)
  if (!stroke) return undefined
  stroke.add(at(first), width(first))
  return {
    move(event: PointerEvent) {
      // All places between two frames, where the browser tells them.
      const events = event.getCoalescedEvents?.() ?? []
      for (const each of events.length ? events : [event]) stroke.add(at(each), width(each))
    },
    end: () => void stroke.end(),
    cancel: () => stroke.cancel(),
  }
}

/** One touch of the brush, from the keyboard. */
export function dab(point: Point, redraw: (id: string) => void): void {
  const stroke = begin(point, redraw)
  stroke?.add(point, 1)
  void stroke?.end()
}

function begin(point: Point, redraw: (id: string) => void): Stroke | undefined {
  const piece = target(point)
  if (!piece) return undefined
  const pixels = usePictures.getState().pixels.get(pictureOf(piece.layer))
  if (piece.locked) say(words.said.isLocked(piece.layer.name))
  if (piece.locked || !pixels) return undefined
  return new Stroke(piece, pixels, redraw)
}

// A stroke's end is encoded and kept while the next may already be made.
let saving: Promise<void> = Promise.resolve()

class Stroke {
  readonly #piece: Piece
  readonly #at: Placement
  readonly #pixels: Pixels
  readonly #erases: boolean
  readonly #before: CanvasImageSource
  readonly #sheet: CanvasRenderingContext2D
  readonly #restored: CanvasRenderingContext2D | undefined
  readonly #original: CanvasImageSource | undefined
  readonly #radius: number
  readonly #soft: number
  readonly #redraw: (id: string) => void
  readonly #dabs: Dab[] = []
  #drawn = 0
  #frame = 0

  constructor(piece: Piece, pixels: Pixels, redraw: (id: string) => void) {
    const { tool, softness } = useDesk.getState()
    const { width, height } = pixels
    this.#piece = piece
    this.#pixels = pixels
    this.#redraw = redraw
    this.#erases = tool === "eraser"
    this.#at = placement(piece.layer, useStudio.getState().document.size)
    this.#radius = diameter() / 2 / this.#at.scale
    this.#soft = softness * this.#radius
    // A stroke that is not kept yet is what the next goes on from.
    this.#before = paintedOver(piece.id) ?? (pixels.levels[0] as CanvasImageSource)
    this.#sheet = surface(width, height)
    this.#sheet.drawImage(this.#before, 0, 0)
    if (!this.#erases) {
      const known = usePictures.getState().pixels.get(piece.original?.sha256 ?? "")
      const fits = known?.width === width && known.height === height
      this.#original = (fits ? known : pixels).levels[0]
      this.#restored = surface(width, height)
    }
  }

  add(point: Point, share: number): void {
    const { x, y } = toPicture(point, this.#at, this.#pixels)
    // Half the fading edge lies within the brush's circle, and half without.
    const radius = Math.max(this.#radius * share - this.#soft / 2, 0.3)
    this.#dabs.push({ x, y, radius })
    this.#frame ||= requestAnimationFrame(() => this.#paint())
  }

  /** Paints what came since the last frame: within its box, the whole stroke over what was there before. */
  #paint(): void {
    this.#frame = 0
    const fresh = this.#dabs.slice(Math.max(this.#drawn - 1, 0))
    if (fresh.length === 0) return
    this.#drawn = this.#dabs.length
    const box = reach(fresh, 2 * this.#soft + 2)
    const clip = (context: CanvasRenderingContext2D) => {
      context.save()
      context.beginPath()
      context.rect(box.left, box.top, box.right - box.left, box.bottom - box.top)
      context.clip()
      context.clearRect(box.left, box.top, box.right - box.left, box.bottom - box.top)
    }
    const sheet = this.#sheet
    clip(sheet)
    sheet.drawImage(this.#before, 0, 0)
    if (this.#restored && this.#original) {
      clip(this.#restored)
      this.#fill(this.#restored)
      this.#restored.globalCompositeOperation = "source-in"
      this.#restored.drawImage(this.#original, 0, 0)
      this.#restored.restore()
      sheet.drawImage(this.#restored.canvas, 0, 0)
    } else {
      sheet.globalCompositeOperation = "destination-out"
      this.#fill(sheet)
    }
    sheet.restore()
    showPainted(this.#piece.id, sheet.canvas)
    this.#redraw(this.#piece.id)
  }

  /** The stroke's area, black with a soft edge: one shape, so that it is nowhere laid on twice. */
  #fill(context: CanvasRenderingContext2D): void {
    // The shape itself is out of sight, and its blurred shadow is what paints: every browser has those.
    const far = this.#pixels.width + 4 * this.#radius + 1000
    context.save()
    context.shadowColor = "#000"
    context.shadowBlur = this.#soft
    context.shadowOffsetX = far
    context.translate(-far, 0)
    context.beginPath()
    this.#dabs.forEach((dab, index) => {
      context.moveTo(dab.x + dab.radius, dab.y)
      context.arc(dab.x, dab.y, dab.radius, 0, 2 * Math.PI)
      const before = this.#dabs[index - 1]
      const [first, ...corners] = before ? band(before, dab).reverse() : []
      if (!first) return
      context.moveTo(first.x, first.y)
      for (const { x, y } of corners) context.lineTo(x, y)
      context.closePath()
    })
    context.fill("nonzero")
    context.restore()
  }

  cancel(): void {
    cancelAnimationFrame(this.#frame)
    const { id } = this.#piece
    if (paintedOver(id) === this.#sheet.canvas)
      showPainted(id, this.#before instanceof HTMLCanvasElement ? this.#before : undefined)
    this.#redraw(id)
  }

  async end(): Promise<void> {
    cancelAnimationFrame(this.#frame)
    this.#paint()
    const own = this.#save.bind(this)
    saving = saving.then(own, own)
    await saving
  }

  async #save(): Promise<void> {
    const { id, layer } = this.#piece
    try {
      const { ref } = await addPicture(await toPng(this.#sheet.canvas))
      const name = this.#erases ? words.edits.erase(layer.name) : words.edits.unerase(layer.name)
      act(name, replacePicture(id, ref))
    } catch {
      tell(words.mask.notKept, "error")
    }
    // A newer stroke shows itself.
    if (paintedOver(id) === this.#sheet.canvas) showPainted(id, undefined)
    this.#redraw(id)
  }
}

/** Has what the brush gives back at hand. */
export function prepare(piece: Piece | undefined): void {
  if (piece?.original) void load(piece.original.sha256)
}
