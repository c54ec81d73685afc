// Every edit of a document, as a function from a document to the next one. store.ts gives them names and undo.

import { create } from "@bufbuild/protobuf"
import {
  type Document,
  type Extent,
  newId,
  type Piece,
  type Placement,
  placement,
  toTransform,
} from "./document"
import { type BlobRef, ImageSchema } from "./gen/collage/v1/blob_pb"
import {
  type Background,
  BackgroundSchema,
  type Layer,
  LayerSchema,
  type Sampling,
} from "./gen/collage/v1/collage_pb"

export type Edit = (document: Document) => Document

const LONGEST_NAME = 64
const LONGEST_TEXT = 300
export const LARGEST_SCALE = 64

// --- pieces ---------------------------------------------------------------------------------------------------------

/** Changes some pieces; those that are locked only where `always` says so. */
export function changePieces(
  ids: readonly string[],
  change: (piece: Piece) => Piece,
  { always = false } = {},
): Edit {
  const chosen = new Set(ids)
  return (document) => ({
    ...document,
    pieces: document.pieces.map((piece) =>
      chosen.has(piece.id) && (always || !piece.locked) ? change(piece) : piece,
    ),
  })
}

/** Changes fields of the layers of some pieces. */
export function setLayers(ids: readonly string[], fields: Partial<Layer>): Edit {
  return changePieces(ids, (piece) => ({ ...piece, layer: { ...piece.layer, ...fields } }), {
    always: true,
  })
}

export function place(id: string, change: Partial<Placement>): Edit {
  return placeAll(new Map([[id, change]]))
}

/** Moves several pieces at once, each to its own place. */
export function placeAll(changes: ReadonlyMap<string, Partial<Placement>>): Edit {
  return (document) =>
    changePieces([...changes.keys()], (piece) => {
      const next = { ...placement(piece.layer, document.size), ...changes.get(piece.id) }
      return { ...piece, layer: { ...piece.layer, transform: toTransform(bounded(next)) } }
    })(document)
}

function bounded(at: Placement): Placement {
  const scale = Math.min(Math.max(at.scale, 0.001), LARGEST_SCALE)
  return { ...at, scale, rotation: turned(at.rotation) }
}

/** The same direction within -180 to 180 degrees. */
export function turned(degrees: number): number {
  const within = (((degrees % 360) + 540) % 360) - 180
  return within === -180 ? 180 : within
}

export function moveBy(ids: readonly string[], right: number, down: number): Edit {
  return (document) => {
    const changes = new Map<string, Partial<Placement>>()
    for (const piece of document.pieces) {
      if (!ids.includes(piece.id)) continue
      const { x, y } = placement(piece.layer, document.size)
      changes.set(piece.id, { x: x + right, y: y + down })
    }
    return placeAll(changes)(document)
  }
}

export function flip(ids: readonly string[], axis: "flipHorizontal" | "flipVertical"): Edit {
  return (document) =>
    changePieces(ids, (piece) => {
      const at = placement(piece.layer, document.size)
      // Flipping comes before turning in the contract; as the eye sees it, a mirror turns the other way.
      const next = { ...at, [axis]: !at[axis], rotation: turned(-at.rotation) }
      return { ...piece, layer: { ...piece.layer, transform: toTransform(next) } }
    })(document)
}

/** Puts a picture of a known size on the canvas, in front of all others, with a place in the scene's words. */
export function addPiece(
  picture: BlobRef,
  extent: Extent,
  words: { text: string; at?: { x: number; y: number }; id?: string },
): Edit {
  return (document) => {
    const text = words.text.slice(0, LONGEST_TEXT).trim() || "thing"
    const name = layerName(
      text,
      document.pieces.map((piece) => piece.layer.name),
    )
    const { width, height } = document.size
    const at: Placement = {
      x: words.at?.x ?? width / 2,
      y: words.at?.y ?? height / 2,
      scale: Math.min(LARGEST_SCALE, (0.5 * width) / extent.width, (0.5 * height) / extent.height),
      rotation: 0,
      flipHorizontal: false,
      flipVertical: false,
    }
    const layer = create(LayerSchema, {
      name,
      text,
      image: create(ImageSchema, { source: { case: "blob", value: picture } }),
      transform: toTransform(at),
    })
    return {
      ...document,
      prompt: withMention(document.prompt, name, text),
      pieces: [...document.pieces, { id: words.id ?? newId(), layer, locked: false }],
    }
  }
}

export function remove(ids: readonly string[]): Edit {
  return (document) => {
    const gone = document.pieces.filter((piece) => ids.includes(piece.id) && !piece.locked)
    const prompt = gone.reduce(
      (text, piece) => withoutMention(text, piece.layer.name),
      document.prompt,
    )
    return { ...document, prompt, pieces: document.pieces.filter((piece) => !gone.includes(piece)) }
  }
}

/** Copies of some pieces, each in front of its original and a little aside. `copies` are the new ids, in order. */
export function duplicate(ids: readonly string[], copies: readonly string[]): Edit {
  return (document) => {
    const aside = Math.round(Math.min(document.size.width, document.size.height) * 0.04)
    const taken = document.pieces.map((piece) => piece.layer.name)
    const groups = new Map<string, string>()
    let prompt = document.prompt
    const pieces: Piece[] = []
    for (const piece of document.pieces) {
      pieces.push(piece)
      const index = ids.indexOf(piece.id)
      if (index < 0) continue
      const name = layerName(piece.layer.name, taken)
      taken.push(name)
      prompt = withMention(prompt, name, piece.layer.text)
      const at = placement(piece.layer, document.size)
      const transform = toTransform({ ...at, x: at.x + aside, y: at.y + aside })
      if (piece.group && !groups.has(piece.group)) groups.set(piece.group, newId())
      pieces.push({
        ...piece,
        id: copies[index] ?? newId(),
        locked: false,
        group: piece.group && groups.get(piece.group),
        layer: { ...piece.layer, name, transform },
      })
    }
    return { ...document, prompt, pieces }
  }
}

/**
 * Puts a picture of the same size in place of a piece's own, where it stands: a cut-out for its photo, a mask painted anew.
 * What it was before the first of these is remembered.
 */
export function replacePicture(id: string, picture: BlobRef): Edit {
  const image = create(ImageSchema, { source: { case: "blob", value: picture } })
  return changePieces([id], (piece) => {
    const source = piece.layer.image?.source
    const own = source?.case === "blob" ? source.value : undefined
    return { ...piece, original: piece.original ?? own, layer: { ...piece.layer, image } }
  })
}

/** A new name, everywhere it is spoken of. A name that is taken or has other signs becomes the nearest free one. */
export function rename(id: string, wanted: string): Edit {
  return (document) => {
    const piece = document.pieces.find((candidate) => candidate.id === id)
    if (!piece || piece.layer.name === wanted) return document
    const others = document.pieces
      .filter((other) => other !== piece)
      .map((other) => other.layer.name)
    const name = layerName(wanted, others)
    return {
      ...setLayers([id], { name })(document),
      prompt: document.prompt.replaceAll(`{${piece.layer.name}}`, `{${name}}`),
    }
  }
}

/** Moves some pieces to stand at `index` of the order without them, back to front; they keep their own order. */
export function reorder(ids: readonly string[], index: number): Edit {
  return (document) => {
    const moved = document.pieces.filter((piece) => ids.includes(piece.id))
    const rest = document.pieces.filter((piece) => !ids.includes(piece.id))
    const at = Math.min(Math.max(index, 0), rest.length)
    return { ...document, pieces: [...rest.slice(0, at), ...moved, ...rest.slice(at)] }
  }
}

/** One step to the front (1) or to the back (-1). */
export function step(ids: readonly string[], direction: 1 | -1): Edit {
  return (document) => {
    const rest = document.pieces.filter((piece) => !ids.includes(piece.id))
    const chosen = document.pieces.filter((piece) => ids.includes(piece.id))
    const edge = direction === 1 ? chosen.at(-1) : chosen[0]
    if (!edge) return document
    const place = document.pieces.indexOf(edge)
    const below = document.pieces.slice(0, place).filter((piece) => rest.includes(piece)).length
    return reorder(ids, below + direction)(document)
  }
}

export function group(ids: readonly string[], name: string | undefined): Edit {
  return changePieces(ids, (piece) => ({ ...piece, group: name }), { always: true })
}

// --- the scene ------------------------------------------------------------------------------------------------------

export function setScene(fields: Partial<Pick<Document, "prompt" | "negativePrompt">>): Edit {
  return (document) => ({ ...document, ...fields })
}

export function setSampling(fields: Partial<Sampling>): Edit {
  return (document) => ({ ...document, sampling: { ...document.sampling, ...fields } })
}

export function setBackground(background: Background): Edit {
  return (document) => ({ ...document, background })
}

export function backgroundPicture(picture: BlobRef): Background {
  const image = create(ImageSchema, { source: { case: "blob", value: picture } })
  return create(BackgroundSchema, { kind: { case: "image", value: image } })
}

/** Another canvas; what stands on it keeps its place in the picture. */
export function resize(size: Extent): Edit {
  return (document) => {
    const factor = Math.min(size.width / document.size.width, size.height / document.size.height)
    const changes = new Map<string, Partial<Placement>>()
    for (const { id, layer } of document.pieces) {
      const at = placement(layer, document.size)
      changes.set(id, {
        x: (at.x - document.size.width / 2) * factor + size.width / 2,
        y: (at.y - document.size.height / 2) * factor + size.height / 2,
        scale: at.scale * factor,
      })
    }
    const pieces = document.pieces.map((piece) => ({ ...piece, locked: false }))
    const placed = placeAll(changes)({ ...document, size, pieces })
    // A lock holds against hands, not against another canvas.
    const locked = new Map(document.pieces.map((piece) => [piece.id, piece.locked]))
    return {
      ...placed,
      pieces: placed.pieces.map((piece) => ({ ...piece, locked: locked.get(piece.id) ?? false })),
    }
  }
}

// --- words ----------------------------------------------------------------------------------------------------------

/** A free layer name for a text: 1 to 64 of A-Z a-z 0-9 _ -. */
export function layerName(text: string, taken: readonly string[]): string {
  const plain = text.normalize("NFKD").replace(/\p{M}/gu, "")
  const base =
    plain
      .replace(/[^A-Za-z0-9_-]+/g, "-")
      .replace(/^-+|-+$/g, "")
      .slice(0, LONGEST_NAME - 4)
      .replace(/-+$/, "") || "layer"
  if (!taken.includes(base)) return base
  const stem = base.replace(/-\d+$/, "")
  for (let number = 2; ; number++) {
    const name = `${stem}-${number}`
    if (!taken.includes(name)) return name
  }
}

/** What a file's name says is in it: "IMG_2041 birthday-cake.png" is "birthday cake". */
export function textOfFile(fileName: string): string {
  return fileName
    .replace(/\.[A-Za-z0-9]{1,5}$/, "")
    .replace(/[_\-.]+/g, " ")
    .replace(/\b(IMG|DSC|PXL|DSCN|Screenshot|image|unnamed|download|copy)\b/gi, " ")
    .replace(/\(\d+\)|\b[\d]{3,}\b|\bat\b\s*$/g, " ")
    .replace(/\s+/g, " ")
    .trim()
}

/** The prompt, speaking of a layer: ", a {name}" at its end where it does not yet. */
export function withMention(prompt: string, name: string, text: string): string {
  if (prompt.includes(`{${name}}`)) return prompt
  const article = /^[aeiou]/i.test(text) ? "an" : "a"
  const mention = `${article} {${name}}`
  const before = prompt.trimEnd()
  if (!before) return mention
  return /[,.;:]$/.test(before) ? `${before} ${mention}` : `${before}, ${mention}`
}

/** The prompt without a layer: its placeholder goes, with the article and the comma or "and" before it. */
export function withoutMention(prompt: string, name: string): string {
  const placeholder = `\\{${name}\\}`
  const mention = new RegExp(
    `(?:\\s*,)?\\s*(?:\\band\\s+)?(?:\\b(?:an?|the)\\s+)?${placeholder}`,
    "gi",
  )
  return prompt.replace(mention, "").replace(/^[\s,]+(?:and\s+)?/, "")
}

/** Whether a document is one that was never touched: nothing on it, nothing said. */
export function isBlank(document: Document): boolean {
  return document.pieces.length === 0 && document.prompt === "" && document.negativePrompt === ""
}
