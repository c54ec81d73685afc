// All versions of this tab's document: in memory as the page shows them, and in IndexedDB.

import { create } from "zustand"
import { type Document, newId, type Option } from "../document"
import type { CreateJobRequest, GeneratedImage } from "../gen/collage/v1/collage_service_pb"
import { database } from "../saved"
import { useTab } from "../start"
import { useStudio } from "../store"
import { tell } from "../voice"
import { words } from "../words"
import { changes } from "./changes"
import { isFinished, type Version } from "./version"

interface Versions {
  /** In the order of asking. */
  readonly versions: readonly Version[]
  /** Whether the saved ones were read. */
  readonly isRead: boolean
}

export const useVersions = create<Versions>()(() => ({ versions: [], isRead: false }))

export function versionNamed(id: string | undefined): Version | undefined {
  return useVersions.getState().versions.find((version) => version.id === id)
}

export function imageOf(option: Option | undefined): GeneratedImage | undefined {
  return versionNamed(option?.version)?.images.find(({ index }) => index === option?.index)
}

/** Reads what is saved of a document. */
export async function readVersions(collage: string): Promise<readonly Version[]> {
  let saved: Version[] = []
  try {
    saved = (await (await database()).getAllFromIndex("versions", "collage", collage)) as Version[]
  } catch {
    // Without a store the page works on; start.ts has said so.
  }
  saved.sort((one, other) => one.number - other.number)
  useVersions.setState({ versions: saved, isRead: true })
  return saved
}

/**
 * Gives a copied document copies of the versions that are drawn. Those under way stay with the first: no job is two tabs'.
 */
export async function copyVersions(from: string, to: string): Promise<void> {
  const db = await database()
  const versions = (await db.getAllFromIndex("versions", "collage", from)) as Version[]
  const ids = new Map(versions.map(({ id }) => [id, newId()]))
  const copied = (option: Option | undefined) => {
    const version = option && ids.get(option.version)
    return version ? { ...option, version } : undefined
  }
  const kept = versions.filter(isFinished)
  for (const version of kept)
    await db.put("versions", {
      ...version,
      id: ids.get(version.id) as string,
      collage: to,
      parent: copied(version.parent),
      document: { ...version.document, drawn: copied(version.document.drawn) },
    } as Version)
  const { document, restore } = useStudio.getState()
  restore({ ...document, drawn: copied(document.drawn) })
}

async function save(version: Version): Promise<void> {
  try {
    await (await database()).put("versions", version)
  } catch {
    tell(words.status.unsaved, "error")
  }
}

/** What makes a version; the rest of it is told from here. */
export interface Asked {
  readonly work: CreateJobRequest["work"]
  /** What the work itself says is different, before what the document says. */
  readonly changed?: readonly string[]
  readonly sweep?: string
  readonly label?: string
}

/** A new version of the document as it stands. It is saved before this answers, so that no job is ever without one. */
export async function addVersion(document: Document, asked: Asked): Promise<Version> {
  const { versions } = useVersions.getState()
  const parent = versionNamed(document.drawn?.version)
  const version: Version = {
    id: newId(),
    collage: useTab.getState().id,
    parent: parent && document.drawn,
    document,
    requestId: newId(),
    sequence: 0n,
    state: "new",
    images: [],
    at: Date.now(),
    number: (versions.at(-1)?.number ?? 0) + 1,
    ...asked,
    changed: [...(asked.changed ?? []), ...(parent ? changes(parent.document, document) : [])],
  }
  useVersions.setState({ versions: [...versions, version] })
  await save(version)
  return version
}

/** Puts down what became of a version. `save` may be left out where nothing is lost by it: the number of an event. */
export async function record(
  id: string,
  fields: Partial<Version>,
  { isSaved = true } = {},
): Promise<void> {
  const { versions } = useVersions.getState()
  const before = versions.find((version) => version.id === id)
  if (!before) return
  const after = { ...before, ...fields }
  useVersions.setState({
    versions: versions.map((version) => (version.id === id ? after : version)),
  })
  if (isSaved) await save(after)
}

/** Puts an option on the canvas, to go on from it: with the collage and all settings that it was drawn from. */
export function pick(option: Option): void {
  const version = versionNamed(option.version)
  if (!version) return
  useStudio.getState().change(words.versions.pick(version.number, option.index + 1), () => ({
    ...version.document,
    drawn: option,
  }))
}
