// The service's plan of the document as it stands: asked for after each edit, the answer of the newest only.

import { create } from "zustand"
import { type Document, type Piece, picturesOf, toCollage } from "./document"
import type { LayerPlan } from "./gen/collage/v1/collage_pb"
import type { Plan } from "./gen/collage/v1/collage_service_pb"
import { pictureBlob } from "./pictures"
import { forget, isAbort, service, type Trouble, trouble, upload } from "./server"

export interface Planned {
  readonly plan?: Plan
  /** The document that `plan` is of; another than the present one while a newer is on its way. */
  readonly of?: Document
  readonly trouble?: Trouble
  /** The document that `trouble` is of. */
  readonly troubleOf?: Document
  readonly isAsking: boolean
}

export const usePlan = create<Planned>()(() => ({ isAsking: false }))

// Edits that follow one another more closely than this are planned once.
const PAUSE_MS = 40
// How long to wait before asking a server again that is not there.
const AGAIN_MS = 3000

let timer: ReturnType<typeof setTimeout> | undefined
let asking: AbortController | undefined

/** Asks for the plan of this document, soon. */
export function replan(document: Document, pauseMs = PAUSE_MS): void {
  clearTimeout(timer)
  asking?.abort()
  if (document.pieces.length === 0) {
    usePlan.setState({ plan: undefined, of: undefined, trouble: undefined, isAsking: false })
    return
  }
  timer = setTimeout(() => void ask(document), pauseMs)
}

async function ask(document: Document): Promise<void> {
  const own = new AbortController()
  asking = own
  usePlan.setState({ isAsking: true })
  try {
    const plan = await withPictures(picturesOf(document), own.signal, () =>
      service.planCollage(
        { collage: toCollage(document), sampling: document.sampling },
        { signal: own.signal },
      ),
    )
    if (own.signal.aborted) return
    usePlan.setState({
      plan: plan.plan,
      of: document,
      trouble: undefined,
      troubleOf: undefined,
      isAsking: false,
    })
  } catch (error) {
    if (own.signal.aborted || isAbort(error)) return
    const told = trouble(error)
    usePlan.setState({ trouble: told, troubleOf: document, isAsking: false })
    if (told.passes) replan(document, told.retryAfterMs ?? AGAIN_MS)
  }
}

/**
 * A call that names pictures: they are uploaded first, and once more where the server has lost them.
 */
export async function withPictures<T>(
  pictures: readonly string[],
  signal: AbortSignal | undefined,
  call: () => Promise<T>,
): Promise<T> {
  await upload(pictures, pictureBlob, signal)
  try {
    return await call()
  } catch (error) {
    if (trouble(error).missing.length === 0) throw error
    forget()
    await upload(pictures, pictureBlob, signal)
    return call()
  }
}

/** What the plan says of a piece; undefined where the plan is of a document without it. */
export function layerPlan(planned: Planned, piece: Piece): LayerPlan | undefined {
  const index = planned.of?.pieces.findIndex(({ id }) => id === piece.id) ?? -1
  return index < 0 ? undefined : planned.plan?.layers[index]
}

/** Something the service says about one place of the document: a warning of the plan, or what is wrong. */
export interface Remark {
  readonly kind: "warning" | "error"
  /** The piece it is about; undefined: the scene. */
  readonly piece?: string
  /** The field below the layer or the collage, for example "noise" or "prompt"; "" for the whole. */
  readonly field: string
  readonly message: string
  readonly reason: string
}

export function remarks(planned: Planned): Remark[] {
  const found: Remark[] = []
  const add = (
    kind: Remark["kind"],
    of: Document | undefined,
    path: string,
    message: string,
    reason: string,
  ) => {
    const match = /^collage\.layers\[(\d+)\]\.?(.*)$/.exec(path)
    const piece = match ? of?.pieces[Number(match[1])] : undefined
    // Who hides a layer knows that it is hidden.
    if (reason === "LAYER_HIDDEN" && piece?.layer.visible === false) return
    const field = match ? (match[2] ?? "") : path.replace(/^(collage|sampling)\./, "")
    found.push({ kind, piece: piece?.id, field, message, reason })
  }
  if (planned.trouble) {
    const { fields, message, reason } = planned.trouble
    for (const [path, description] of fields)
      add("error", planned.troubleOf, path, description, reason)
    if (fields.size === 0) add("error", planned.troubleOf, "", message, reason)
  } else
    for (const { field, message, reason } of planned.plan?.warnings ?? [])
      add("warning", planned.of, field, message, reason)
  return found
}
