// What is different between two documents, in words.

import { equals } from "@bufbuild/protobuf"
import { type Document, type Piece, pictureOf, placement } from "../document"
import { BackgroundSchema, type Layer, StructureSchema } from "../gen/collage/v1/collage_pb"
import { words } from "../words"

const DIALS = ["noise", "attract", "repel", "opacity", "seed"] as const
const SAMPLING = ["model", "sampler", "steps", "guidanceScale", "seed"] as const

/** Each change in a few words, the scene first. Empty where the two ask for the same. */
export function changes(before: Document, after: Document): string[] {
  const said: string[] = []
  const { versions } = words
  if (before.prompt !== after.prompt) said.push(versions.scene)
  if (before.negativePrompt !== after.negativePrompt) said.push(versions.negative)
  if (!equals(BackgroundSchema, before.background, after.background)) said.push(versions.background)
  if (before.size.width !== after.size.width || before.size.height !== after.size.height)
    said.push(versions.size(after.size.width, after.size.height))
  for (const setting of SAMPLING)
    if (before.sampling[setting] !== after.sampling[setting])
      said.push(
        versions.dial(
          versions.settings[setting],
          show(before.sampling[setting]),
          show(after.sampling[setting]),
        ),
      )
  const old = new Map(before.pieces.map((piece) => [piece.id, piece]))
  const kept: Piece[] = []
  for (const piece of after.pieces) {
    const was = old.get(piece.id)
    if (!was) said.push(versions.added(piece.layer.name))
    else {
      kept.push(piece)
      said.push(...layerChanges(was, piece, before, after))
    }
    old.delete(piece.id)
  }
  for (const { layer } of old.values()) said.push(versions.removed(layer.name))
  const order = before.pieces.filter(({ id }) => kept.some((piece) => piece.id === id))
  if (order.some(({ id }, index) => id !== kept[index]?.id)) said.push(versions.reordered)
  return said
}

function layerChanges(was: Piece, is: Piece, before: Document, after: Document): string[] {
  const { versions } = words
  const said: string[] = []
  const { name } = is.layer
  if (was.layer.name !== name) said.push(versions.renamed(was.layer.name, name))
  if (was.layer.text !== is.layer.text) said.push(versions.text(name, is.layer.text))
  if (pictureOf(was.layer) !== pictureOf(is.layer)) said.push(versions.picture(name))
  const [from, to] = [placement(was.layer, before.size), placement(is.layer, after.size)]
  if (from.x !== to.x || from.y !== to.y) said.push(versions.moved(name))
  if (from.scale !== to.scale) said.push(versions.resized(name))
  if (from.flipHorizontal !== to.flipHorizontal || from.flipVertical !== to.flipVertical)
    said.push(versions.flipped(name))
  else if (from.rotation !== to.rotation) said.push(versions.turned(name))
  const [seen, sees] = [was.layer.visible ?? true, is.layer.visible ?? true]
  if (seen !== sees) said.push(sees ? versions.shown(name) : versions.hidden(name))
  for (const dial of DIALS)
    if (was.layer[dial] !== is.layer[dial])
      said.push(
        versions.dialOf(name, versions.settings[dial], show(was.layer[dial]), show(is.layer[dial])),
      )
  if (!sameStructure(was.layer, is.layer)) said.push(versions.structure(name))
  if (JSON.stringify(was.layer.appearance) !== JSON.stringify(is.layer.appearance))
    said.push(versions.word(name))
  return said
}

function sameStructure(one: Layer, other: Layer): boolean {
  return (
    one.structure.length === other.structure.length &&
    one.structure.every((structure, index) =>
      equals(StructureSchema, structure, other.structure[index] as typeof structure),
    )
  )
}

function show(value: number | bigint | string | undefined): string {
  if (value === undefined || value === "") return words.versions.automatic
  return typeof value === "number" ? String(Math.round(value * 1000) / 1000) : String(value)
}
