// The art that comes with the page (examples/art), and the collage of the first visit (examples/bento).

import { create } from "@bufbuild/protobuf"
import { colour, type Document, newId, toTransform } from "./document"
import { ImageSchema } from "./gen/collage/v1/blob_pb"
import { LayerSchema, SamplingSchema } from "./gen/collage/v1/collage_pb"
import { addPicture } from "./pictures"

export interface Art {
  /** "birthday cake" */
  readonly name: string
  /** Which set it is of: "noto", "fluent" ... */
  readonly set: string
  readonly url: string
}

const urls = import.meta.glob<string>("../../examples/art/*.png", {
  query: "?url",
  import: "default",
  eager: true,
})

export const art: readonly Art[] = Object.entries(urls).map(([path, url]) => {
  const [, name = "", set = ""] = /([^/]+)-([a-z]+)\.png$/.exec(path) ?? []
  return { name: name.replaceAll("-", " "), set, url }
})

export async function fetchArt({ url, name }: Art): Promise<File> {
  const answer = await fetch(url)
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`)
  return new File([await answer.blob()], `${name}.png`, { type: "image/png" })
}

// As examples/bento/collage.yaml has it; what the model on the server does not know (its ControlNet) is left out there.
const SIDE = 128
const BENTO = [
  {
    name: "box",
    art: "bento box noto",
    text: "bento box",
    x: 64,
    y: 66,
    scale: 0.52,
    rotation: 0,
    noise: 0.15,
  },
  {
    name: "salmon",
    art: "sushi noto",
    text: "sushi",
    x: 37,
    y: 46,
    scale: 0.2,
    rotation: 0,
    noise: 0.35,
  },
  {
    name: "shrimp",
    art: "fried shrimp twemoji",
    text: "fried shrimp",
    x: 92,
    y: 47,
    scale: 0.19,
    rotation: -8,
    noise: 0.3,
  },
  {
    name: "rice",
    art: "rice ball fluent",
    text: "rice ball",
    x: 38,
    y: 89,
    scale: 0.2,
    rotation: 0,
    noise: 0.45,
  },
  {
    name: "broccoli",
    art: "broccoli noto",
    text: "broccoli",
    x: 68,
    y: 80,
    scale: 0.19,
    rotation: 0,
    noise: 0.3,
  },
  {
    name: "carrot",
    art: "carrot flat",
    text: "carrot",
    x: 96,
    y: 86,
    scale: 0.18,
    rotation: 15,
    noise: 0.3,
    attract: 0.8,
    repel: 0.8,
  },
] as const

/** The collage of the first visit, on a square canvas of this side. */
export async function example(side: number, kinds: readonly string[]): Promise<Document> {
  const factor = side / SIDE
  const pieces = await Promise.all(
    BENTO.map(async ({ name, art: wanted, text, x, y, scale, rotation, ...dials }) => {
      const found = art.find((each) => `${each.name} ${each.set}` === wanted)
      if (!found) throw new Error(`no art named ${wanted}`)
      const { ref } = await addPicture(await fetchArt(found))
      const layer = create(LayerSchema, {
        name,
        text,
        image: create(ImageSchema, { source: { case: "blob", value: ref } }),
        transform: toTransform({
          x: x * factor,
          y: y * factor,
          scale: scale * factor,
          rotation,
          flipHorizontal: false,
          flipVertical: false,
        }),
        structure: kinds.includes("canny") ? [{ kind: "canny", emphasis: 1 }] : [],
        ...dials,
      })
      return { id: newId(), layer, locked: false }
    }),
  )
  return {
    size: { width: side, height: side },
    prompt:
      "a {box}, {salmon}, a {shrimp}, a {rice}, a {broccoli} and a {carrot} on a wooden table",
    negativePrompt: "",
    background: colour(176, 122, 72),
    pieces,
    sampling: create(SamplingSchema),
  }
}
