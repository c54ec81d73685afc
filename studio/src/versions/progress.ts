// How far jobs are, told from their events. Not saved: after a reload the next event says it again.

import { create } from "zustand"
import type { JobEvent } from "../gen/collage/v1/collage_service_pb"

export interface Progress {
  /** Jobs ahead of it; undefined once it is at work. */
  readonly position?: number
  /** "compose", "learn" or "generate"; "" before. */
  readonly stage: string
  readonly step: number
  /** 0 where not known yet. */
  readonly total: number
  /** When this page saw its first step, and which it was: the pace of it. */
  readonly first?: { readonly step: number; readonly at: number }
  /** When it saw its last. */
  readonly last?: number
  /** What the plan said, in seconds; 0 where the server cannot tell yet. */
  readonly expected: number
  /** A layer whose word is being learned. */
  readonly word?: {
    readonly layer: string
    readonly step: number
    readonly total: number
    readonly loss: number
  }
  /** Object URLs of the newest preview of each picture. */
  readonly previews: ReadonlyMap<number, string>
}

export const AT_FIRST: Progress = { stage: "", step: 0, total: 0, expected: 0, previews: new Map() }

/** Progress by the id of the version. */
export const useProgress = create<ReadonlyMap<string, Progress>>()(() => new Map())

export function setProgress(id: string, progress: Progress | undefined): void {
  const next = new Map(useProgress.getState())
  if (progress) next.set(id, progress)
  else {
    for (const url of next.get(id)?.previews.values() ?? []) URL.revokeObjectURL(url)
    next.delete(id)
  }
  useProgress.setState(next, true)
}

/** The progress after one more event, at `now` in milliseconds. */
export function advanced(
  progress: Progress,
  { kind }: Pick<JobEvent, "kind">,
  now: number,
): Progress {
  switch (kind.case) {
    case "queued":
      return { ...progress, position: kind.value.position }
    case "stageStarted":
      // A job that was given back begins again.
      return {
        ...progress,
        position: undefined,
        stage: kind.value.stage,
        step: 0,
        first: undefined,
      }
    case "planned":
      return { ...progress, expected: kind.value.plan?.estimatedSeconds ?? 0 }
    case "step": {
      const { step, total } = kind.value
      const first = progress.first ?? { step, at: now }
      return { ...progress, position: undefined, word: undefined, step, total, first, last: now }
    }
    case "word": {
      const { layer, step, total, loss, word } = kind.value
      return { ...progress, word: word ? undefined : { layer, step, total, loss } }
    }
    default:
      return progress
  }
}

/** Seconds that are left at `now`, from its own pace; before the second step from the plan. Undefined: unknown. */
export function secondsLeft(progress: Progress, now: number): number | undefined {
  const { first, last, step, total, expected } = progress
  if (first && last !== undefined && step > first.step) {
    const pace = (last - first.at) / (step - first.step)
    return Math.max(0, pace * (total - step) - (now - last)) / 1000
  }
  if (progress.position !== undefined || expected === 0) return undefined
  return first ? Math.max(0, expected - (now - first.at) / 1000) : expected
}
