// What versions do when the page opens: the saved ones are read, and those that are unfinished are followed again.

import { showOnCanvas } from "../draw/looking"
import { drawOptions } from "../draw/work"
import { useTab } from "../start"
import { useStudio } from "../store"
import { readVersions } from "./versions"
import { keepWatch } from "./watch"

export async function begin({ isFirst }: { isFirst: boolean }): Promise<void> {
  const saved = await readVersions(useTab.getState().id)
  keepWatch()
  showOnCanvas()
  // The first visit shows at once what comes of a collage.
  if (isFirst && saved.length === 0) await drawOptions(useStudio.getState().document)
}
