// Drives a door with the client that pages use, as it is published; see test_door.py. Arguments: address of the door,
// file of descriptors, file of a GenerateImagesRequest in JSON. Prints what it saw as one line of JSON.

import { readFileSync } from "node:fs"
import { createFileRegistry, fromBinary, fromJson, toBinary, toJson } from "@bufbuild/protobuf"
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt"
import { Code, ConnectError, createClient } from "@connectrpc/connect"
import { createGrpcWebTransport } from "@connectrpc/connect-web"

const [url, descriptors, asked] = process.argv.slice(2)
const registry = createFileRegistry(
  fromBinary(FileDescriptorSetSchema, readFileSync(descriptors)),
)
const message = (name) => registry.getMessage(name)
const client = createClient(
  registry.getService("collage.v1.CollageService"),
  createGrpcWebTransport({ baseUrl: url, useBinaryFormat: true }),
)
const BadRequest = message("google.rpc.BadRequest")
const Generate = message("collage.v1.GenerateImagesRequest")
const request = fromJson(Generate, JSON.parse(readFileSync(asked, "utf8")))

async function failure(call) {
  try {
    await call
  } catch (error) {
    const told = ConnectError.from(error)
    const fields = told.findDetails(BadRequest).flatMap((each) => each.fieldViolations)
    return { code: Code[told.code], message: told.rawMessage, fields: fields.map((f) => f.field) }
  }
  return null
}

const saw = {}
const { models } = await client.listModels({})
saw.models = models.map((model) => model.name)

const { plan } = await client.planCollage({ collage: request.collage, sampling: request.sampling })
saw.plan = toJson(message("collage.v1.Plan"), plan, { registry })

const wrong = structuredClone(request.collage)
wrong.layers[1].noise = 7
saw.wrong = await failure(client.planCollage({ collage: wrong }))
saw.late = await failure(client.planCollage({ collage: request.collage }, { timeoutMs: 1 }))
saw.missing = await failure(client.getJob({ name: "jobs/none" }))

const log = []
for await (const { event } of client.generateImages(request)) {
  if (event.kind.case !== "queued") log.push([Number(event.sequence), event.kind.case, event.job])
}
saw.log = log
const name = log[0][2]
saw.resumed = []
for await (const { event } of client.watchJob({ name, afterSequence: 4n }))
  if (event.kind.case !== "queued") saw.resumed.push(Number(event.sequence))

// Whoever goes takes the job along, where that was asked for.
const gone = new AbortController()
const long = { ...request, requestId: "", onDisconnect: 2 }
long.sampling = { ...request.sampling, steps: 900 }
try {
  for await (const { event } of client.generateImages(long, { signal: gone.signal })) {
    saw.left = event.job
    if (event.kind.case === "step") gone.abort()
  }
} catch (error) {
  saw.aborted = Code[ConnectError.from(error).code]
  if (!saw.left) throw error
}
saw.state = 0
const end = Date.now() + 30_000
while (![3, 4, 5].includes(saw.state) && Date.now() < end)
  saw.state = (await client.getJob({ name: saw.left })).job.state

const { blob } = (await client.getJob({ name })).job.images[0]
saw.parts = 0
let size = 0
for await (const part of client.getBlob({ sha256: blob.sha256 })) {
  saw.parts += 1
  if (part.part.case === "chunk") size += part.part.value.length
}
saw.whole = size === Number(blob.sizeBytes)
saw.bytes = toBinary(message("collage.v1.BlobRef"), blob).length > 0
console.log(JSON.stringify(saw))
