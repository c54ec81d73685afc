// What versions do when the page opens: the saved ones are read, and those that are unfinished are followed again.

import { showOnCanvas } from "../draw/looking"
import { drawOptions } from "../draw/work"
import { openStart } from "../export/files"
import { trouble } from "../server"
import { type Started, useTab } from "../start"
import { useStudio } from "../store"
import { tell } from "../voice"
import { isFinished } from "./version"
import { copyVersions, pick, readVersions, useVersions, versionNamed } from "./versions"
import { keepWatch } from "./watch"

export async function begin({ isFirst, copyOf }: Started): Promise<void> {
  if (copyOf) await copyVersions(copyOf, useTab.getState().id)
  const saved = await readVersions(useTab.getState().id)
  keepWatch()
  showOnCanvas()
  const isGiven = await openStart().catch((error) => {
    tell(trouble(error).message, "error")
    return false
  })
  // The first visit shows at once what comes of a collage.
  if (isFirst && !isGiven && saved.length === 0) await drawFirst()
}

async function drawFirst(): Promise<void> {
  const { document } = useStudio.getState()
  const { id } = await drawOptions(document)
  const stop = useVersions.subscribe(() => {
    const version = versionNamed(id)
    if (!version || !isFinished(version)) return
    stop()
    // Its picture stays on the canvas, unless somebody has begun to work meanwhile.
    if (version.state === "done" && useStudio.getState().document === document)
      pick({ version: id, index: 0 })
  })
}
