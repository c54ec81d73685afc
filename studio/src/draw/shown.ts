// The picture that lies over the collage on the canvas: what is being drawn, or what was picked. The canvas (canvas/)
// shows it stretched over the whole canvas, above all layers; nothing else is to be done with it there.

import { create } from "zustand"

export interface Shown {
  /** Where an <img> finds it: an object URL or an address of this origin. Undefined: the collage alone is seen. */
  readonly picture?: string
  /** "preview": a small picture of what is being drawn, to be smoothed; "result": a drawn one, of the canvas' size. */
  readonly kind: "preview" | "result"
}

export const useShown = create<Shown>()(() => ({ kind: "result" }))
