// A version: what was asked for at one moment, the job that draws it, and the pictures that came of it.

import type { Document, Option } from "../document"
import type {
  CreateJobRequest,
  GeneratedImage,
  RedoWork,
} from "../gen/collage/v1/collage_service_pb"

export type State = "new" | "queued" | "running" | "done" | "failed" | "cancelled"

export interface Version {
  readonly id: string
  /** The document it is of (saved.ts). */
  readonly collage: string
  /** The option that stood on the canvas when it was asked for. */
  readonly parent?: Option
  /** The collage with all its settings, as it then was. */
  readonly document: Document
  /** What was asked for, whole: the same id with the same work finds the same job. */
  readonly work: CreateJobRequest["work"]
  /** Chosen, and saved, before the server hears of it. */
  readonly requestId: string
  /** "jobs/…", once the server has it. */
  readonly job?: string
  /** The last event that was taken in. */
  readonly sequence: bigint
  readonly state: State
  readonly images: readonly GeneratedImage[]
  /** The composite it was drawn from: a digest, once planned. */
  readonly composite?: string
  /** Milliseconds since 1970, of the asking. */
  readonly at: number
  /** 1, 2, 3 ... in the order of asking, of one document. */
  readonly number: number
  /** What is different from the parent, in words. */
  readonly changed: readonly string[]
  /** Versions that were asked for together, to be seen side by side: a sweep. */
  readonly sweep?: string
  /** What is said under its picture in a sweep: "noise 0.4". */
  readonly label?: string
  /** Why there is no picture, in words. */
  readonly why?: string
}

export function isFinished({ state }: Version): boolean {
  return state === "done" || state === "failed" || state === "cancelled"
}

export function redone({ work }: Version): RedoWork | undefined {
  return work.case === "redo" ? work.value : undefined
}

/** How many pictures a version has, or will have. */
export function options(version: Version): number {
  if (version.state === "done") return version.images.length
  const { value } = version.work
  return (value && "sampling" in value && value.sampling?.images) || 1
}

/** A version in the tree, `depth` steps below one without a parent. */
export interface Node {
  readonly version: Version
  readonly depth: number
}

/** All versions, each below its parent, in the order of asking. One whose parent is gone stands at the top. */
export function tree(versions: readonly Version[]): Node[] {
  const ids = new Set(versions.map(({ id }) => id))
  const below = new Map<string | undefined, Version[]>()
  for (const version of [...versions].sort((a, b) => a.number - b.number)) {
    const parent = version.parent?.version
    const key = parent !== undefined && ids.has(parent) ? parent : undefined
    below.set(key, [...(below.get(key) ?? []), version])
  }
  const nodes: Node[] = []
  const visit = (parent: string | undefined, depth: number) => {
    for (const version of below.get(parent) ?? []) {
      nodes.push({ version, depth })
      visit(version.id, depth + 1)
    }
  }
  visit(undefined, 0)
  return nodes
}

/** The versions seen side by side with this one, itself included: those of its sweep. */
export function together(versions: readonly Version[], version: Version): Version[] {
  if (!version.sweep) return [version]
  return versions.filter(({ sweep }) => sweep === version.sweep).sort((a, b) => a.number - b.number)
}
