// Following jobs: each unfinished version is asked for (again, under the same id, where the server never heard of it) and
// watched from the last event that was taken in, while the page is seen.

import { Code, ConnectError } from "@connectrpc/connect"
import { newId, picturesOf } from "../document"
import type { JobEvent } from "../gen/collage/v1/collage_service_pb"
import { load } from "../pictures"
import { withPictures } from "../plan"
import { service, trouble } from "../server"
import { say, tell } from "../voice"
import { words } from "../words"
import { AT_FIRST, advanced, setProgress, useProgress } from "./progress"
import { isFinished, type Version } from "./version"
import { record, useVersions, versionNamed } from "./versions"

// A browser has six connections to a server: more streams than this and nothing else gets through.
const STREAMS = 2
const AGAIN_MS = 1500
// Errors after which the same call never works.
const FINAL = [
  Code.InvalidArgument,
  Code.NotFound,
  Code.AlreadyExists,
  Code.PermissionDenied,
  Code.Unauthenticated,
  Code.FailedPrecondition,
  Code.OutOfRange,
  Code.Unimplemented,
]

// Events of which nothing is lost where their number is not saved.
const OFTEN = ["preview", "step", "word"]

const followed = new Map<string, AbortController>()
let streams = 0
const waiting: (() => void)[] = []

/** Follows all that is unfinished, whenever the page is seen. */
export function keepWatch(): void {
  const look = () => {
    followAll()
    if (document.visibilityState === "hidden")
      for (const controller of followed.values()) controller.abort()
  }
  document.addEventListener("visibilitychange", look)
  look()
}

/** Follows what is not followed yet; what is asked for in a tab that nobody sees waits until it is seen. */
export function followAll(): void {
  if (document.visibilityState === "hidden") return
  for (const version of useVersions.getState().versions)
    if (!isFinished(version)) void follow(version.id)
}

async function follow(id: string): Promise<void> {
  if (followed.get(id)?.signal.aborted === false) return
  const own = new AbortController()
  followed.set(id, own)
  try {
    while (!own.signal.aborted) {
      const version = versionNamed(id)
      if (!version || isFinished(version)) break
      try {
        await (version.job ? watch(version, version.job, own.signal) : ask(version))
      } catch (error) {
        if (own.signal.aborted) break
        await meet(version, error, own.signal)
      }
    }
  } finally {
    if (followed.get(id) === own) followed.delete(id)
  }
}

/** Asks for the version's job. It goes on when the page is hidden: a job is not half asked for. */
async function ask({ id, requestId, work, document }: Version): Promise<void> {
  const pictures = [...new Set([...picturesOf(document), ...picturesOfWork(work)])]
  const { job } = await withPictures(pictures, undefined, () =>
    service.createJob({ requestId, work }),
  )
  const now = versionNamed(id)
  // Asked for twice where the page was hidden and seen again meanwhile; both were told the same job.
  if (!job || !now || now.job) return
  // Whoever cancelled it meanwhile meant this job.
  if (now.state === "cancelled") await service.cancelJob({ name: job.name })
  // One that is found again may be finished by now: then its log still tells its pictures, and its end.
  else await record(id, { job: job.name, state: "queued", sequence: 0n })
}

/** Pictures that a redo names and its document does not: its parent, and layers cut by its brush. */
function picturesOfWork({ case: kind, value }: Version["work"]): string[] {
  if (kind !== "redo") return []
  const images = [value.parent, ...(value.collage?.layers ?? []).map(({ image }) => image)]
  return images.flatMap((image) =>
    image?.source.case === "blob" ? [image.source.value.sha256] : [],
  )
}

async function watch({ id, sequence }: Version, name: string, signal: AbortSignal): Promise<void> {
  await turn(signal)
  try {
    const events = service.watchJob({ name, afterSequence: sequence }, { signal })
    for await (const { event } of events) {
      if (event) await take(id, event)
      if (signal.aborted) return
    }
  } finally {
    streams -= 1
    waiting.shift()?.()
  }
  const version = versionNamed(id)
  // A stream that ends early (a gateway that stops) is taken up again; not at once, lest it be a loop.
  if (version && !isFinished(version)) await pause(AGAIN_MS, signal)
}

async function turn(signal: AbortSignal): Promise<void> {
  while (streams >= STREAMS) {
    await new Promise<void>((next) => {
      waiting.push(next)
      signal.addEventListener("abort", () => next(), { once: true })
    })
    signal.throwIfAborted()
  }
  streams += 1
}

/** Takes one event in. */
async function take(id: string, event: JobEvent): Promise<void> {
  const version = versionNamed(id)
  if (!version) return
  const { kind, sequence } = event
  const before = useProgress.getState().get(id) ?? AT_FIRST
  let progress = advanced(before, event, performance.now())
  if (kind.case === "preview") progress = withPreview(progress, kind.value.index, kind.value.png)
  setProgress(id, progress)
  switch (kind.case) {
    case "image": {
      const others = version.images.filter(({ index }) => index !== kind.value.index)
      const images = [...others, kind.value].sort((one, other) => one.index - other.index)
      await record(id, { images, sequence })
      void load(kind.value.blob?.sha256 ?? "")
      break
    }
    case "planned":
      await record(id, {
        state: "running",
        sequence,
        composite: kind.value.plan?.composite?.sha256,
      })
      break
    case "done":
      await record(id, { state: "done", sequence })
      setProgress(id, undefined)
      say(words.draw.done(version.number))
      break
    case "failed":
      await record(id, { state: "failed", sequence, why: kind.value.message })
      setProgress(id, undefined)
      say(words.draw.failed(version.number, kind.value.message))
      break
    case "cancelled":
      await record(id, { state: "cancelled", sequence })
      setProgress(id, undefined)
      break
    case "queued":
      await record(id, { state: "queued" }, { isSaved: false })
      break
    default:
      await record(
        id,
        { state: "running", sequence },
        { isSaved: !OFTEN.includes(kind.case ?? "") },
      )
  }
}

function withPreview(
  progress: ReturnType<typeof advanced>,
  index: number,
  png: Uint8Array,
): typeof progress {
  const previews = new Map(progress.previews)
  const old = previews.get(index)
  previews.set(index, URL.createObjectURL(new Blob([new Uint8Array(png)], { type: "image/png" })))
  // The old one may be on the screen until the new one is decoded.
  if (old) setTimeout(() => URL.revokeObjectURL(old), 1000)
  return { ...progress, previews }
}

async function meet(version: Version, error: unknown, signal: AbortSignal): Promise<void> {
  const { code } = ConnectError.from(error)
  if (code === Code.NotFound && version.job) {
    // The server has lost it (another data folder): it is asked for anew, under its own id.
    await record(version.id, { job: undefined, sequence: 0n, state: "new", images: [] })
    return
  }
  const told = trouble(error)
  if (FINAL.includes(code)) {
    const [why = told.message] = told.fields.values()
    await record(version.id, { state: "failed", why })
    setProgress(version.id, undefined)
    say(words.draw.failed(version.number, why))
    return
  }
  await pause(told.retryAfterMs ?? AGAIN_MS, signal)
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((next) => {
    const timer = setTimeout(next, ms)
    signal.addEventListener("abort", () => {
      clearTimeout(timer)
      next()
    })
  })
}

/** Stops a version's job; what was drawn of it by then stays. */
export async function cancel(id: string): Promise<void> {
  const version = versionNamed(id)
  if (!version || isFinished(version)) return
  await record(id, { state: "cancelled" })
  setProgress(id, undefined)
  followed.get(id)?.abort()
  try {
    if (version.job) await service.cancelJob({ name: version.job })
  } catch (error) {
    tell(trouble(error).message, "error")
  }
}

/** Asks once more for a version without pictures: another job, in the same place of the tree. */
export async function askAgain(id: string): Promise<void> {
  await record(id, {
    requestId: newId(),
    job: undefined,
    sequence: 0n,
    state: "new",
    images: [],
    why: undefined,
  })
  void follow(id)
}
