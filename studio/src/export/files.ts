// Files in and out by way of the door: OpenRaster, PSD and zipped folders are read and written there.

import { fromJson, type JsonValue, toJson } from "@bufbuild/protobuf"
import { type Document, fromCollage, picturesOf, toCollage } from "../document"
import { resize } from "../edits"
import { CollageSchema } from "../gen/collage/v1/collage_pb"
import { fitting } from "../inspector/sizes"
import { useModels } from "../models"
import { pictureBlob } from "../pictures"
import { withPictures } from "../plan"
import { doorUrl, httpError } from "../server"
import { useStudio } from "../store"
import { imageOf } from "../versions/versions"
import { tell } from "../voice"
import { words } from "../words"

export type Form = "ora" | "psd" | "zip"

/** What `openFile` takes, as an <input> wants it. */
export const OPENED = ".ora,.psd,.zip"

/** Whether a file is a collage of its own, and no picture to put on the canvas. */
export function isCollageFile({ name }: File): boolean {
  return /\.(ora|psd|zip)$/i.test(name)
}

/** Puts the collage of a file in place of the document, as one edit. What the file had that is not shown is told. */
export async function openFile(file: File): Promise<void> {
  const address = doorUrl(`files/open?name=${encodeURIComponent(file.name)}`)
  const answer = await fetch(address, { method: "POST", body: file })
  if (!answer.ok) throw await httpError(answer)
  put(await answer.json(), words.edits.open(file.name))
}

/** Opens the collage that `collage studio PATH` was called with, where the address says that there is one. */
export async function openStart(): Promise<boolean> {
  if (new URLSearchParams(location.search).get("open") !== "start") return false
  // A reload goes on with what has become of it.
  history.replaceState(null, "", location.pathname)
  const answer = await fetch(doorUrl("start"))
  if (!answer.ok) throw await httpError(answer)
  put(await answer.json(), words.edits.openStart)
  return true
}

/** What the door answers for a file. */
interface Opened {
  readonly collage: JsonValue
  readonly warnings?: readonly (string | { message: string })[]
}

function put({ collage, warnings = [] }: Opened, edit: string): void {
  const whole = fromCollage(fromJson(CollageSchema, collage, { ignoreUnknownFields: true }))
  const [model] = useModels.getState().models
  const size = model ? fitting(whole.size, model) : whole.size
  const document = size === whole.size ? whole : resize(size)(whole)
  useStudio.getState().change(edit, () => document)
  if (document !== whole) tell(words.export.fitted(size.width, size.height))
  for (const warning of warnings) tell(typeof warning === "string" ? warning : warning.message)
}

/** The document as a file, with its picked picture on top where there is one. */
export async function written(document: Document, form: Form): Promise<Blob> {
  const sha256 = imageOf(document.drawn)?.blob?.sha256
  const body = JSON.stringify({
    collage: toJson(CollageSchema, toCollage(document)),
    ...(sha256 && { result: { sha256 } }),
  })
  const pictures = sha256 ? [...picturesOf(document), sha256] : picturesOf(document)
  return withPictures(pictures, undefined, async () => {
    const answer = await fetch(doorUrl(`files/save?form=${form}`), {
      method: "POST",
      body,
      headers: { "content-type": "application/json" },
    })
    if (!answer.ok) throw await httpError(answer)
    return answer.blob()
  })
}

/** The picked picture; undefined where none is. */
export async function pickedPicture({ drawn }: Document): Promise<Blob | undefined> {
  const digest = imageOf(drawn)?.blob?.sha256
  return digest ? pictureBlob(digest) : undefined
}

/** Lets the browser save a file. */
export function save(blob: Blob, name: string): void {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(blob)
  link.download = name
  link.click()
  // The browser has taken it by then.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000)
}
