// "Remove background": the service cuts a photo's foreground out; the layer then has that picture in its place.

import { Code, ConnectError } from "@connectrpc/connect"
import { create } from "zustand"
import { act } from "../acts"
import { type Piece, pictureOf } from "../document"
import { replacePicture } from "../edits"
import type { BlobRef, Image } from "../gen/collage/v1/blob_pb"
import type { Point as Mark } from "../gen/collage/v1/collage_pb"
import { load, usePictures } from "../pictures"
import { withPictures } from "../plan"
import { service, trouble } from "../server"
import { useStudio } from "../store"
import { say, tell } from "../voice"
import { words } from "../words"

interface CuttingOut {
  /** Whether the server can; until it says that it cannot. */
  readonly isOffered: boolean
  /** The piece that is being cut out; "" for none. */
  readonly busy: string
}

export const useCutOut = create<CuttingOut>()(() => ({ isOffered: true, busy: "" }))

/** What the service cuts out of a picture: what is meant by the marks, where there are any. It is loaded. */
export async function cutFrom(image: Image, points: readonly Mark[]): Promise<BlobRef> {
  const digests = image.source.case === "blob" ? [image.source.value.sha256] : []
  const answer = await withPictures(digests, undefined, () =>
    service.cutOut({ image, points: [...points] }),
  )
  if (answer.image?.source.case !== "blob") throw new ConnectError("no picture came", Code.Internal)
  const ref = answer.image.source.value
  await load(ref.sha256)
  if (usePictures.getState().lost.has(ref.sha256))
    throw new ConnectError(words.errors.unreachable, Code.Unavailable)
  return ref
}

/** Takes the ground of a piece's picture away. What happened to the piece meanwhile stays. */
export async function cutOut(piece: Piece): Promise<void> {
  const digest = pictureOf(piece.layer)
  useCutOut.setState({ busy: piece.id })
  say(words.mask.removing)
  try {
    if (!piece.layer.image) return
    const ref = await cutFrom(piece.layer.image, [])
    const now = useStudio.getState().document.pieces.find(({ id }) => id === piece.id)
    // Another picture by now is not what was cut.
    if (now && pictureOf(now.layer) === digest)
      act(words.edits.cutOut(now.layer.name), replacePicture(piece.id, ref))
  } catch (error) {
    if (ConnectError.from(error).code === Code.Unimplemented) {
      useCutOut.setState({ isOffered: false })
      tell(words.mask.cannotCut, "error")
    } else tell(trouble(error).message, "error")
  } finally {
    useCutOut.setState({ busy: "" })
  }
}
