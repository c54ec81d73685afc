import type { GeneratedImage } from "../gen/collage/v1/collage_service_pb"
import type { Version } from "../versions/version"

export function Redo(_: { version: Version; image: GeneratedImage }) {
  return null
}
