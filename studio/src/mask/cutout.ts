// "Remove background": the service cuts a photo's foreground out; the layer then has that picture.

import { create } from "zustand"
import type { Piece } from "../document"

interface CuttingOut {
  /** Whether the server can. */
  readonly isOffered: boolean
  /** The piece that is being cut out; "" for none. */
  readonly busy: string
}

export const useCutOut = create<CuttingOut>()(() => ({ isOffered: false, busy: "" }))

export async function cutOut(_piece: Piece): Promise<void> {}
