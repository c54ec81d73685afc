// What is asked for: options of the collage, some layers of a picture again, and the sweep of one dial.

import { create } from "@bufbuild/protobuf"
import {
  type Document,
  type Extent,
  newId,
  type Piece,
  pictureOf,
  toCollage,
  toTransform,
} from "../document"
import type { BlobRef } from "../gen/collage/v1/blob_pb"
import { ImageSchema } from "../gen/collage/v1/blob_pb"
import { type Layer, type Sampling, SamplingSchema } from "../gen/collage/v1/collage_pb"
import {
  type CreateJobRequest,
  GenerateWorkSchema,
  RedoWorkSchema,
} from "../gen/collage/v1/collage_service_pb"
import type { Version } from "../versions/version"
import { addVersion, imageOf } from "../versions/versions"
import { followAll } from "../versions/watch"
import { words } from "../words"

type Work = CreateJobRequest["work"]

// Previews of all pictures of one request (Sampling.preview_every), with room for samplers of two calls a step.
const MOST_PREVIEWS = 256
// Previews of one picture: enough to see it come.
const PREVIEWS = 12
// Where the model's own number is not known.
const STEPS = 30

/** The sampling with previews as often as they help and the server takes. */
export function withPreviews(sampling: Sampling): Sampling {
  const steps = sampling.steps ?? STEPS
  const images = sampling.images ?? 1
  const each = Math.max(1, Math.min(PREVIEWS, Math.floor(MOST_PREVIEWS / images)))
  const previewEvery = sampling.previewEvery ?? Math.max(1, Math.ceil(steps / each))
  return create(SamplingSchema, { ...sampling, previewEvery })
}

export function generateWork(document: Document): Work {
  return {
    case: "generate",
    value: create(GenerateWorkSchema, {
      collage: toCollage(document),
      sampling: withPreviews(document.sampling),
    }),
  }
}

export async function drawOptions(document: Document): Promise<Version> {
  const version = await addVersion(document, { work: generateWork(document) })
  followAll()
  return version
}

/** What a redo is to be. */
export interface Redo {
  /** Names of the layers to draw again. */
  readonly layers: readonly string[]
  /** How many options. */
  readonly images: number
  /** Start from the cut-out pasted over the picture, in place of the picture's own pixels. */
  readonly restoreCutout: boolean
  /**
   * Where to draw in place of the layers' own masks, by layer name: pictures of the canvas' size, opaque there.
   */
  readonly areas?: ReadonlyMap<string, BlobRef>
}

/**
 * Some layers of the picked picture again, with new noise.
 *
 * A redone area is what can be seen of its layers. Painted ones therefore go as layers of the canvas' size, the front one
 * of them before all others (its area may have been widened over these), each with the words and dials of the layer it
 * stands for; the document keeps its own.
 */
export function redoWork(document: Document, parent: BlobRef, redo: Redo): Work {
  const collage = toCollage(document)
  let layers = collage.layers.map((layer) => {
    if (!redo.layers.includes(layer.name)) return layer
    const area = redo.areas?.get(layer.name)
    return { ...(area ? painted(layer, area, document.size) : layer), seed: undefined }
  })
  const front = redo.areas && layers.findLast(({ name }) => redo.areas?.has(name))
  if (front) layers = [...layers.filter((layer) => layer !== front), front]
  return {
    case: "redo",
    value: create(RedoWorkSchema, {
      collage: { ...collage, layers },
      parent: create(ImageSchema, { source: { case: "blob", value: parent } }),
      layers: [...redo.layers],
      // A seed set for all would give the same noise again.
      sampling: withPreviews({ ...document.sampling, images: redo.images, seed: undefined }),
      restoreCutout: redo.restoreCutout && !redo.areas,
    }),
  }
}

function painted(layer: Layer, area: BlobRef, { width, height }: Extent): Layer {
  return {
    ...layer,
    image: create(ImageSchema, { source: { case: "blob", value: area } }),
    transform: toTransform({
      x: width / 2,
      y: height / 2,
      scale: 1,
      rotation: 0,
      flipHorizontal: false,
      flipVertical: false,
    }),
    opacity: undefined,
    // A word is learned from a layer's own pixels, which these are not.
    appearance: layer.appearance?.source.case === "learn" ? undefined : layer.appearance,
  }
}

/** Asks for a redo of the picked picture; undefined where none is picked. */
export async function drawRedo(document: Document, redo: Redo): Promise<Version | undefined> {
  const parent = imageOf(document.drawn)?.blob
  if (!parent) return undefined
  const changed = [words.versions.redone(words.names(redo.layers))]
  if (redo.areas) changed.push(words.versions.brushed)
  const version = await addVersion(document, { work: redoWork(document, parent, redo), changed })
  followAll()
  return version
}

/** A dial that can be swept: of a layer, or of the whole ("guidanceScale", "steps"). */
export interface Dial {
  readonly name: "noise" | "attract" | "repel" | "guidanceScale" | "steps"
  /** The piece; undefined for dials of the whole. */
  readonly piece?: string
}

/** `count` values from `from` to `to`, evenly, whole where the dial is. */
export function values(dial: Dial, from: number, to: number, count: number): number[] {
  const between = Array.from({ length: count }, (_, index) =>
    count === 1 ? from : from + ((to - from) * index) / (count - 1),
  )
  const rounded = between.map((value) =>
    dial.name === "steps" ? Math.round(value) : Math.round(value * 100) / 100,
  )
  return [...new Set(rounded)]
}

/** The document with one dial set, the seed given so that only the dial is different. */
export function dialled(document: Document, dial: Dial, value: number, seed: bigint): Document {
  const sampling = { ...document.sampling, images: 1, seed: document.sampling.seed ?? seed }
  if (dial.piece === undefined)
    return { ...document, sampling: { ...sampling, [dial.name]: value } }
  const pieces = document.pieces.map((piece) =>
    piece.id === dial.piece ? { ...piece, layer: { ...piece.layer, [dial.name]: value } } : piece,
  )
  return { ...document, sampling, pieces }
}

/** One version a value, all asked for at once and seen side by side. */
export async function drawSweep(
  document: Document,
  dial: Dial,
  all: readonly number[],
): Promise<readonly Version[]> {
  const sweep = newId()
  const seed = BigInt(crypto.getRandomValues(new Uint32Array(1))[0] as number)
  const piece = document.pieces.find(({ id }) => id === dial.piece)
  const versions: Version[] = []
  for (const value of all) {
    const asked = dialled(document, dial, value, seed)
    const label = words.draw.swept(words.versions.settings[dial.name], value, piece?.layer.name)
    versions.push(await addVersion(asked, { work: generateWork(asked), sweep, label }))
  }
  followAll()
  return versions
}

/** The pieces that can be drawn again: those that are seen. */
export function redoable(document: Document): Piece[] {
  return document.pieces.filter(({ layer }) => layer.visible !== false && pictureOf(layer) !== "")
}
