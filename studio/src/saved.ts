// What survives a reload, a closed tab and a restarted server: documents, their pictures and their versions, in
// IndexedDB. One document a tab; `claim` says which is this tab's.

import { type DBSchema, type IDBPDatabase, openDB } from "idb"
import { type Document, newId } from "./document"

export interface SavedDocument {
  readonly id: string
  readonly document: Document
  /** Milliseconds since 1970, of the last change. */
  readonly at: number
}

export interface SavedPicture {
  readonly sha256: string
  readonly blob: Blob
  readonly width: number
  readonly height: number
}

/** Versions are drawing's (versions.ts); here they are records with an id, of a document. */
export interface SavedVersion {
  readonly id: string
  readonly collage: string
}

interface Schema extends DBSchema {
  documents: { key: string; value: SavedDocument; indexes: { at: number } }
  pictures: { key: string; value: SavedPicture }
  versions: { key: string; value: SavedVersion; indexes: { collage: string } }
  settings: { key: string; value: unknown }
}

let opened: Promise<IDBPDatabase<Schema>> | undefined

export function database(): Promise<IDBPDatabase<Schema>> {
  opened ??= openDB<Schema>("collage-studio", 1, {
    upgrade(db) {
      db.createObjectStore("documents", { keyPath: "id" }).createIndex("at", "at")
      db.createObjectStore("pictures", { keyPath: "sha256" })
      db.createObjectStore("versions", { keyPath: "id" }).createIndex("collage", "collage")
      db.createObjectStore("settings")
    },
  })
  return opened
}

const TAB = "collage-studio-document"

/**
 * The id of this tab's document, and what is saved under it.
 *
 * A reload gets its own again; a new tab the newest that no other tab has open, or else a new one. A duplicated tab, which
 * comes with the id of the first, goes on with a copy.
 */
export async function claim(): Promise<
  (SavedDocument | { id: string; document?: undefined }) & { copyOf?: string }
> {
  const db = await database()
  const own = sessionStorage.getItem(TAB)
  if (own) {
    const saved = await db.get("documents", own)
    if (await hold(own)) return saved ?? keep({ id: own })
    const id = newId()
    await hold(id)
    return keep(saved ? { ...saved, id, copyOf: own } : { id })
  }
  const newest = await db.getAllFromIndex("documents", "at")
  for (const saved of newest.reverse()) if (await hold(saved.id)) return keep(saved)
  const id = newId()
  await hold(id)
  return keep({ id })
}

function keep<T extends { id: string }>(saved: T): T {
  sessionStorage.setItem(TAB, saved.id)
  return saved
}

// Locks end with the tab, however it ends. Without them (pages that are not secure) tabs share the newest document.
function hold(id: string): Promise<boolean> {
  if (!navigator.locks) return Promise.resolve(true)
  return new Promise((answer) => {
    void navigator.locks.request(`collage-studio/${id}`, { ifAvailable: true }, (lock) => {
      answer(lock !== null)
      return lock && new Promise(() => {})
    })
  })
}

/** Saves what it is given, the newest only: while one write is under way later ones wait and replace one another. */
export class Autosave {
  #waiting: SavedDocument | undefined
  #writing = false

  constructor(readonly failed: (error: unknown) => void) {}

  get isIdle(): boolean {
    return !this.#writing
  }

  save(document: SavedDocument): void {
    this.#waiting = document
    if (!this.#writing) void this.#write()
  }

  async #write(): Promise<void> {
    this.#writing = true
    try {
      while (this.#waiting) {
        const next = this.#waiting
        this.#waiting = undefined
        await (await database()).put("documents", next)
      }
    } catch (error) {
      this.failed(error)
    } finally {
      this.#writing = false
    }
  }
}

export async function savePicture(picture: SavedPicture): Promise<void> {
  await (await database()).put("pictures", picture)
}

export async function savedPicture(sha256: string): Promise<SavedPicture | undefined> {
  return (await database()).get("pictures", sha256)
}

export async function setting<T>(key: string): Promise<T | undefined> {
  return (await (await database()).get("settings", key)) as T | undefined
}

export async function saveSetting(key: string, value: unknown): Promise<void> {
  await (await database()).put("settings", value, key)
}
