// Checks a built page: that it is small and names no address outside its own origin. `node scripts/bundle.mjs FOLDER`.

import { readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { gzipSync } from "node:zlib"

const MOST_BYTES = 1_000_000
// Names, not places: no browser ever asks them.
const NAMES = [
  "http://www.w3.org/", // XML namespaces
  "https://react.dev/errors/", // in the text of React's errors
  "https://git.io/", // in the text of a Konva warning
  "https://konvajs.org/",
  "https://konvajs.github.io/",
  "https://github.com/konvajs/",
]
const [folder] = process.argv.slice(2)
const files = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((f) =>
  f.isFile(),
)
let bytes = 0
const outside = []
for (const file of files) {
  const path = join(file.parentPath, file.name)
  const data = readFileSync(path)
  bytes += gzipSync(data, { level: 9 }).length
  if (!/\.(html|js|css|svg)$/.test(file.name)) continue
  for (const [address] of data
    .toString()
    .matchAll(/(?:https?:)?\/\/[a-z0-9-]+(?:\.[a-z0-9-]+)+[^\s"'`)]*/gi))
    if (!NAMES.some((name) => address.startsWith(name))) outside.push(`${file.name}: ${address}`)
}
console.log(`${files.length} files, ${bytes} bytes gzipped of ${MOST_BYTES}`)
if (outside.length) console.log(`addresses outside the page's origin:\n${outside.join("\n")}`)
process.exit(bytes > MOST_BYTES || outside.length ? 1 : 0)
