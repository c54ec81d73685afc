// The way to the service: calls by gRPC-Web, pictures by plain HTTP, and its errors in words.

import { Code, ConnectError, createClient } from "@connectrpc/connect"
import { createGrpcWebTransport } from "@connectrpc/connect-web"
import type { BlobRef } from "./gen/collage/v1/blob_pb"
import { CollageService } from "./gen/collage/v1/collage_service_pb"
import {
  BadRequestSchema,
  ErrorInfoSchema,
  PreconditionFailureSchema,
  RetryInfoSchema,
} from "./gen/google/rpc/error_details_pb"
import { sha256 } from "./sha256"
import { words } from "./words"

// The page may lie below any path; the door is where the page is.
const BASE = new URL(".", globalThis.document?.baseURI ?? "http://localhost/").href.replace(
  /\/$/,
  "",
)

export const service = createClient(
  CollageService,
  createGrpcWebTransport({ baseUrl: BASE, useBinaryFormat: true }),
)

/** An address at the door: "files/open". */
export function doorUrl(path: string): string {
  return `${BASE}/${path}`
}

export function blobUrl(digest: string): string {
  return `${BASE}/blobs/${digest}`
}

/** A blob's name: its digest, length and media type. */
export async function refOf(blob: Blob): Promise<BlobRef> {
  return {
    $typeName: "collage.v1.BlobRef",
    sha256: await sha256(await blob.arrayBuffer()),
    sizeBytes: BigInt(blob.size),
    mediaType: blob.type,
  }
}

// What the server is known to hold. It may lose it (another data folder): then a call says so, and `forget` is called.
const held = new Set<string>()

export function forget(): void {
  held.clear()
}

/** Uploads those of these blobs that the server lacks. `find` is asked for their bytes. */
export async function upload(
  digests: readonly string[],
  find: (digest: string) => Promise<Blob | undefined>,
  signal?: AbortSignal,
): Promise<void> {
  const unsure = digests.filter((digest) => !held.has(digest))
  if (unsure.length === 0) return
  const { missingSha256 } = await service.checkBlobs({ sha256: unsure }, { signal })
  for (const digest of unsure) if (!missingSha256.includes(digest)) held.add(digest)
  for (const digest of missingSha256) {
    const blob = await find(digest)
    // Then the call that needs it names it.
    if (blob) await put(digest, blob, signal)
  }
}

async function put(digest: string, blob: Blob, signal?: AbortSignal): Promise<void> {
  const answer = await fetch(blobUrl(digest), {
    method: "PUT",
    body: blob,
    headers: { "content-type": blob.type },
    signal,
  })
  if (!answer.ok) throw await httpError(answer)
  held.add(digest)
}

/** A stored blob's bytes. */
export async function download(digest: string, signal?: AbortSignal): Promise<Blob> {
  const answer = await fetch(blobUrl(digest), { signal })
  if (!answer.ok) throw await httpError(answer)
  held.add(digest)
  return answer.blob()
}

/** The error of a plain HTTP answer: a google.rpc.Status in JSON where it is the door's own. */
export async function httpError(answer: Response): Promise<ConnectError> {
  const status = (await answer.json().catch(() => undefined)) as
    | { code?: number; message?: string }
    | undefined
  const code = status?.code ?? (answer.status === 404 ? Code.NotFound : Code.Unavailable)
  return new ConnectError(status?.message ?? `${answer.status} ${answer.statusText}`, code)
}

/** What a failed call says: words for people, and the fields it is about. */
export interface Trouble {
  readonly message: string
  /** Field path in the request ("collage.layers[2].noise") to what is wrong there. */
  readonly fields: ReadonlyMap<string, string>
  /** Stable name of the error, where the service gave one. */
  readonly reason: string
  /** Whether the same call may work later. */
  readonly passes: boolean
  /** Digests that the server lacks. */
  readonly missing: readonly string[]
  readonly retryAfterMs?: number
}

export function trouble(error: unknown): Trouble {
  const failure = ConnectError.from(error)
  const fields = new Map<string, string>()
  for (const { fieldViolations } of failure.findDetails(BadRequestSchema))
    for (const { field, description } of fieldViolations) fields.set(field, description)
  const missing = failure
    .findDetails(PreconditionFailureSchema)
    .flatMap(({ violations }) => violations.map(({ subject }) => /[0-9a-f]{64}/.exec(subject)?.[0]))
    .filter((digest) => digest !== undefined)
  const [retry] = failure.findDetails(RetryInfoSchema)
  const delay = retry?.retryDelay
  const passes = [Code.Unavailable, Code.ResourceExhausted, Code.Aborted].includes(failure.code)
  return {
    message: said(failure),
    fields,
    reason: failure.findDetails(ErrorInfoSchema)[0]?.reason ?? "",
    passes,
    missing,
    retryAfterMs: delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6,
  }
}

function said(failure: ConnectError): string {
  // A fetch that failed has no server's words; the browser's ("Failed to fetch") help nobody.
  // Nor do gRPC's own ("failed to connect to all addresses") where the door found no service behind it.
  const isServices = failure.findDetails(ErrorInfoSchema).length > 0
  if (failure.code === Code.Unavailable && !isServices) return words.errors.unreachable
  if (failure.code === Code.Unknown && failure.cause instanceof TypeError)
    return words.errors.unreachable
  return failure.rawMessage || words.errors.unknown
}

export function isAbort(error: unknown): boolean {
  return ConnectError.from(error).code === Code.Canceled
}
