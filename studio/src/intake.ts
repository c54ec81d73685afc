// Files and clipboard to pictures that the server takes: PNG, JPEG or WebP with 8 bits a channel, of bounded size.

import { newId } from "./document"
import { addPiece, backgroundPicture, type Edit, setBackground, textOfFile } from "./edits"
import { isCollageFile, openFile } from "./export/files"
import type { BlobRef } from "./gen/collage/v1/blob_pb"
import { addPicture, type Pixels } from "./pictures"
import { trouble } from "./server"
import { useStudio } from "./store"
import { say, tell } from "./voice"
import { words } from "./words"

// services/common/pictures.py: MAX_PIXELS; CollageService.PutBlob: 64 MiB in all.
const MOST_PIXELS = 16_000_000
const MOST_BYTES = 64 * 1024 * 1024
const TAKEN = ["image/png", "image/jpeg", "image/webp"]

export interface Taken {
  readonly ref: BlobRef
  readonly pixels: Pixels
  readonly name: string
}

/** The pictures among these files. What cannot be used is told in words. */
export async function take(files: readonly File[]): Promise<Taken[]> {
  const taken: Taken[] = []
  for (const file of files) {
    try {
      taken.push({ ...(await addPicture(await acceptable(file))), name: file.name })
    } catch {
      tell(words.errors.undecodable(file.name || "This file"), "error")
    }
  }
  return taken
}

/** Puts pictures on the canvas as new layers, as one edit; answers their ids. A file of a whole collage is opened. */
export async function addFiles(
  files: readonly File[],
  options: { at?: { x: number; y: number }; limit?: number } = {},
): Promise<string[]> {
  const collage = files.find(isCollageFile)
  if (collage) {
    await openFile(collage).catch((error) => tell(trouble(error).message, "error"))
    return []
  }
  const pictures = await take(files)
  return addTaken(pictures, options)
}

export function addTaken(
  pictures: readonly Taken[],
  { at, limit = 32 }: { at?: { x: number; y: number }; limit?: number } = {},
): string[] {
  const { document, change, select } = useStudio.getState()
  const room = limit - document.pieces.length
  if (pictures.length > room) tell(words.errors.tooMany(limit), "error")
  const fitting = pictures.slice(0, Math.max(room, 0))
  const [first] = fitting
  if (!first) return []
  const ids = fitting.map(() => newId())
  const spread = Math.min(document.size.width, document.size.height) * 0.06
  const edit: Edit = (before) =>
    fitting.reduce((next, { ref, pixels, name }, index) => {
      const place = at ?? { x: before.size.width / 2, y: before.size.height / 2 }
      const moved = { x: place.x + index * spread, y: place.y + index * spread }
      return addPiece(ref, pixels, { text: textOfFile(name), at: moved, id: ids[index] })(next)
    }, before)
  const name =
    fitting.length === 1
      ? words.edits.add(textOfFile(first.name) || first.name)
      : words.edits.addMany(fitting.length)
  change(name, edit)
  select(ids)
  say(name)
  return ids
}

/** Lays a picture under all layers. */
export async function addBackground(file: File): Promise<void> {
  const [picture] = await take([file])
  if (!picture) return
  useStudio.getState().change(words.edits.background, setBackground(backgroundPicture(picture.ref)))
  say(words.edits.background)
}

/** The files of a drop or a paste. */
export function filesOf(data: DataTransfer | null): File[] {
  return [...(data?.files ?? [])].filter(
    (file) => file.type.startsWith("image/") || !file.type || isCollageFile(file),
  )
}

/** The file as the server takes it: unchanged where that is possible. */
async function acceptable(file: File): Promise<Blob> {
  const type = await trueType(file)
  const image = await decoded(file)
  const { naturalWidth: width, naturalHeight: height } = image
  // An SVG may have no size of its own.
  const extent = width && height ? { width, height } : { width: 1024, height: 1024 }
  const factor = Math.min(1, Math.sqrt(MOST_PIXELS / (extent.width * extent.height)))
  if (factor === 1 && file.size <= MOST_BYTES && TAKEN.includes(type) && !(await isDeep(file)))
    return file.type === type ? file : file.slice(0, file.size, type)
  const canvas = document.createElement("canvas")
  canvas.width = Math.floor(extent.width * factor)
  canvas.height = Math.floor(extent.height * factor)
  const context = canvas.getContext("2d") as CanvasRenderingContext2D
  context.imageSmoothingQuality = "high"
  context.drawImage(image, 0, 0, canvas.width, canvas.height)
  const opaque = type === "image/jpeg"
  const blob = await new Promise<Blob | null>((done) =>
    canvas.toBlob(done, opaque ? "image/jpeg" : "image/png", 0.95),
  )
  if (!blob) throw new Error("the picture cannot be encoded")
  if (factor < 1) tell(words.intake.shrunk(file.name, canvas.width, canvas.height))
  else if (!opaque) tell(words.intake.converted(file.name))
  return blob
}

// An <img> decodes what createImageBitmap does not (SVG), and turns a JPEG as its EXIF says, as the server does.
async function decoded(file: Blob): Promise<HTMLImageElement> {
  const url = URL.createObjectURL(file)
  try {
    const image = new Image()
    image.src = url
    await image.decode()
    return image
  } finally {
    // Decoded pixels stay with the element.
    URL.revokeObjectURL(url)
  }
}

/** The media type that the bytes say; files from elsewhere often have none, or a wrong one. */
async function trueType(file: Blob): Promise<string> {
  const head = new Uint8Array(await file.slice(0, 12).arrayBuffer())
  const text = String.fromCharCode(...head)
  if (text.startsWith("\x89PNG")) return "image/png"
  if (text.startsWith("\xff\xd8\xff")) return "image/jpeg"
  if (text.startsWith("RIFF") && text.endsWith("WEBP")) return "image/webp"
  return file.type
}

/** Whether it is a PNG with 16 bits a channel. */
async function isDeep(file: Blob): Promise<boolean> {
  const head = new Uint8Array(await file.slice(0, 25).arrayBuffer())
  return head[0] === 0x89 && head[24] === 16
}
