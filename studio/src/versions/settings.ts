// All that a version was asked for with, as names and values to read.

import { words } from "../words"
import { redone, type Version } from "./version"

/** Names and values, the whole's first, then those of each layer, from the front. */
export function settings(version: Version): [string, string][] {
  const { document, images } = version
  const { sampling } = document
  const said = words.versions
  const text = (value: unknown) =>
    value === undefined || value === "" ? said.automatic : String(value)
  const rows: [string, string][] = [
    [said.scene, document.prompt],
    [said.negative, document.negativePrompt],
    [said.canvas, `${document.size.width} × ${document.size.height}`],
    [said.settings.model, text(sampling.model)],
    [said.settings.sampler, text(sampling.sampler)],
    [said.settings.steps, text(sampling.steps)],
    [said.settings.guidanceScale, text(sampling.guidanceScale)],
    [said.settings.seed, images.map(({ seed }) => seed).join(", ") || text(sampling.seed)],
  ]
  const redo = redone(version)
  if (redo) rows.push([said.redoneLayers, redo.layers.join(", ")])
  for (const { layer } of [...document.pieces].reverse()) {
    const dials = (["noise", "attract", "repel", "opacity", "seed"] as const)
      .filter((dial) => layer[dial] !== undefined)
      .map((dial) => `${said.settings[dial]} ${layer[dial]}`)
    const structure = layer.structure.map(({ kind }) => kind)
    const hidden = layer.visible === false ? [said.isHidden] : []
    rows.push([layer.name, [`“${layer.text}”`, ...dials, ...structure, ...hidden].join(", ")])
  }
  return rows.filter(([, value]) => value !== "")
}
