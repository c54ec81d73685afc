// The collage as text for other ways in: the command line, Python, and the JSON that the door takes.

import { toJson } from "@bufbuild/protobuf"
import { type Document, toCollage } from "../document"
import { PlanCollageRequestSchema } from "../gen/collage/v1/collage_service_pb"

/** The proto JSON of a PlanCollageRequest, which is also what a GenerateWork is made of. */
export function asJson(document: Document): string {
  const request = {
    $typeName: "collage.v1.PlanCollageRequest" as const,
    collage: toCollage(document),
    sampling: document.sampling,
  }
  return JSON.stringify(toJson(PlanCollageRequestSchema, request), null, 2)
}

/** A program that draws the collage at the server that holds its pictures. */
export function asPython(document: Document): string {
  // A raw string may hold JSON as it is: in JSON no three quotes follow one another without a backslash.
  return `from pathlib import Path

from google.protobuf import json_format

from collage.v1 import collage_service_pb2 as pb
from collage_client import CollageClient

request = json_format.Parse(
    r"""
${asJson(document)}
""",
    pb.PlanCollageRequest(),
)

# Where \`collage serve\` says it listens; it holds the pictures that the request names by digest.
with CollageClient("127.0.0.1:50051") as client:
    result = client.generate(request.collage, sampling=request.sampling).result()
for index, image in enumerate(result.images):
    Path(f"image-{index}.png").write_bytes(image)
`
}

/** The command that draws the collage from the file that "Export" saves. */
export function asCommand(document: Document, file: string): string {
  const { images, seed, steps, guidanceScale, sampler, model, adapters } = document.sampling
  const options: [string, unknown][] = [
    ["--images", images],
    ["--seed", seed],
    ["--steps", steps],
    ["--guidance", guidanceScale],
    ["--sampler", sampler || undefined],
    ...adapters.map(
      ({ name, weight }) =>
        ["--adapter", weight === undefined ? name : `${name}=${weight}`] as [string, unknown],
    ),
    ["--model", model || undefined],
  ]
  const given = options
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => ` ${name} ${quoted(String(value))}`)
  return `collage generate ${quoted(file)}${given.join("")} --out out/collage`
}

/** A word of a POSIX shell. */
function quoted(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`
}
