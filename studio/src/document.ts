// What the artist makes: the document that undo, autosave and drawing stand on, and its way to the contract and back.
//
// Everything in it is treated as immutable: an edit (edits.ts) gives a new document that shares what did not change.

import { create } from "@bufbuild/protobuf"
import type { BlobRef } from "./gen/collage/v1/blob_pb"
import {
  type Background,
  BackgroundSchema,
  type Collage,
  CollageSchema,
  type Layer,
  LayerSchema,
  type Sampling,
  SamplingSchema,
  SizeSchema,
  type Transform,
  TransformSchema,
} from "./gen/collage/v1/collage_pb"

export interface Extent {
  readonly width: number
  readonly height: number
}

/** A layer of the collage, and what only the page knows of it. `layer.image.source` is a blob. */
export interface Piece {
  readonly id: string
  readonly layer: Layer
  readonly locked: boolean
  /** Pieces of one group are selected together. */
  readonly group?: string
  /** The picture before anything was cut from it: what the brush gives back. Of the size of the layer's own. */
  readonly original?: BlobRef
}

export interface Document {
  readonly size: Extent
  readonly prompt: string
  readonly negativePrompt: string
  readonly background: Background
  /** Back to front. */
  readonly pieces: readonly Piece[]
  readonly sampling: Sampling
  /** The drawn picture that was picked to go on from; undefined before the first. */
  readonly drawn?: Option
}

/** One picture of a version (versions/version.ts). */
export interface Option {
  readonly version: string
  /** 0 to the number of its pictures - 1. */
  readonly index: number
}

/** A transform with every number set. */
export interface Placement {
  readonly x: number
  readonly y: number
  readonly scale: number
  readonly rotation: number
  readonly flipHorizontal: boolean
  readonly flipVertical: boolean
}

/** The grey that lies under a collage without a background: RGB 150, the paper's. */
export const GREY = colour(150, 150, 150)

export function colour(red: number, green: number, blue: number): Background {
  return create(BackgroundSchema, {
    kind: {
      case: "color",
      value: { $typeName: "collage.v1.Color", red, green, blue },
    },
  })
}

export function emptyDocument(size: Extent): Document {
  return {
    size,
    prompt: "",
    negativePrompt: "",
    background: GREY,
    pieces: [],
    sampling: create(SamplingSchema),
  }
}

/** Works where `crypto.randomUUID` does not: on pages that are neither https nor of this machine. */
export function newId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  bytes[6] = ((bytes[6] as number) & 0x0f) | 0x40
  bytes[8] = ((bytes[8] as number) & 0x3f) | 0x80
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5")
}

export function placement(layer: Layer, size: Extent): Placement {
  const transform = layer.transform
  return {
    x: transform?.x ?? size.width / 2,
    y: transform?.y ?? size.height / 2,
    scale: transform?.scale ?? 1,
    rotation: transform?.rotation ?? 0,
    flipHorizontal: transform?.flipHorizontal ?? false,
    flipVertical: transform?.flipVertical ?? false,
  }
}

export function toTransform(placement: Placement): Transform {
  return create(TransformSchema, placement)
}

/** The digest of a piece's picture; "" where it has none. */
export function pictureOf(layer: Layer): string {
  const source = layer.image?.source
  return source?.case === "blob" ? source.value.sha256 : ""
}

/** Digests of all pictures that a document is made of, each once. */
export function picturesOf(document: Document): string[] {
  const digests = new Set<string>()
  for (const { layer } of document.pieces) {
    digests.add(pictureOf(layer))
    for (const { image } of layer.structure)
      if (image?.source.case === "blob") digests.add(image.source.value.sha256)
  }
  const { kind } = document.background
  if (kind.case === "image" && kind.value.source.case === "blob")
    digests.add(kind.value.source.value.sha256)
  digests.delete("")
  return [...digests]
}

/** Digests of what pieces were before anything was cut from them. */
export function originalsOf({ pieces }: Document): string[] {
  return pieces.flatMap(({ original }) => (original ? [original.sha256] : []))
}

export function toCollage(document: Document): Collage {
  return create(CollageSchema, {
    size: create(SizeSchema, document.size),
    prompt: document.prompt,
    negativePrompt: document.negativePrompt,
    background: document.background,
    layers: document.pieces.map((piece) => piece.layer),
  })
}

/** A collage whose pictures are blobs (an opened file, a version's settings) as a document. */
export function fromCollage(collage: Collage, sampling?: Sampling): Document {
  return {
    size: { width: collage.size?.width ?? 512, height: collage.size?.height ?? 512 },
    prompt: collage.prompt,
    negativePrompt: collage.negativePrompt,
    background: collage.background ?? GREY,
    pieces: collage.layers.map((layer) => ({
      id: newId(),
      layer: create(LayerSchema, layer),
      locked: false,
    })),
    sampling: sampling ?? create(SamplingSchema),
  }
}

/** The pieces whose layers a redo or a sweep names. */
export function named(document: Document, names: Iterable<string>): Piece[] {
  const wanted = new Set(names)
  return document.pieces.filter((piece) => wanted.has(piece.layer.name))
}
