// Words that are learned or stored: the list of them, and the job that learns one now.

import { create } from "zustand"
import { newId, type Piece, picturesOf, toCollage } from "../document"
import type { Word } from "../gen/collage/v1/collage_service_pb"
import { withPictures } from "../plan"
import { isAbort, service, trouble } from "../server"
import { useStudio } from "../store"
import { say } from "../voice"
import { words } from "../words"

export const useWords = create<{ words: readonly Word[] }>()(() => ({ words: [] }))

export async function loadWords(): Promise<void> {
  try {
    const found: Word[] = []
    for (let pageToken = ""; ; ) {
      const page = await service.listWords({ pageSize: 100, pageToken })
      found.push(...page.words)
      pageToken = page.nextPageToken
      if (!pageToken) break
    }
    useWords.setState({ words: found })
  } catch {
    // The list stays as it was; the plan tells what is wrong.
  }
}

export interface Learning {
  readonly state: "running" | "done" | "failed"
  readonly job: string
  readonly step: number
  readonly total: number
  readonly losses: readonly number[]
  readonly message: string
}

/** What is learned, or was on this page, by piece. */
export const useLearning = create<{ of: ReadonlyMap<string, Learning> }>()(() => ({
  of: new Map(),
}))

function put(id: string, change: Partial<Learning>): void {
  useLearning.setState(({ of }) => {
    const fresh = { state: "running", job: "", step: 0, total: 0, losses: [], message: "" } as const
    return { of: new Map([...of, [id, { ...(of.get(id) ?? fresh), ...change }]]) }
  })
}

// A curve needs no more points.
const MOST_POINTS = 200

/** Learns the look of a piece. A stored word of the same pixels is found at once. */
export async function learnNow(piece: Piece): Promise<void> {
  const { document } = useStudio.getState()
  const { name } = piece.layer
  put(piece.id, { state: "running", job: "", step: 0, total: 0, losses: [], message: "" })
  try {
    const { job } = await withPictures(picturesOf(document), undefined, () =>
      service.createJob({
        requestId: newId(),
        work: {
          case: "learn",
          value: {
            collage: toCollage(document),
            layers: [name],
            model: document.sampling.model,
          },
        },
      }),
    )
    if (!job) return
    put(piece.id, { job: job.name })
    await watch(piece.id, name, job.name)
  } catch (error) {
    if (!isAbort(error)) fail(piece.id, trouble(error).message)
  }
}

async function watch(id: string, layer: string, job: string): Promise<void> {
  for await (const { event } of service.watchJob({ name: job })) {
    const kind = event?.kind
    if (kind?.case === "word" && kind.value.layer === layer) {
      const { step, total, loss, word } = kind.value
      const known = useLearning.getState().of.get(id)?.losses ?? []
      // Before the first step there is none.
      const losses = step > 0 ? [...known, loss] : known
      put(id, { step, total, losses: losses.slice(-MOST_POINTS) })
      if (word) await loadWords()
    } else if (kind?.case === "done") {
      put(id, { state: "done" })
      say(words.inspector.learnedOf(layer))
      await loadWords()
    } else if (kind?.case === "failed") fail(id, kind.value.message)
    else if (kind?.case === "cancelled")
      useLearning.setState(({ of }) => ({ of: new Map([...of].filter(([key]) => key !== id)) }))
  }
}

function fail(id: string, message: string): void {
  put(id, { state: "failed", message })
  say(message)
}

export function stopLearning(id: string): void {
  const job = useLearning.getState().of.get(id)?.job
  if (job) void service.cancelJob({ name: job }).catch(() => {})
}
