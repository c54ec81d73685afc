import { expect, it } from "vitest"
import { forgetUnused, type Pixels, usePictures } from "./pictures"

// Four mega-pixels: 21 MB with all smaller levels, so that twelve are spared.
const pixels: Pixels = {
  width: 2000,
  height: 2000,
  levels: [],
  alpha: { width: 0, height: 0, data: new Uint8Array() },
}

it("pixels of pictures that are not used are forgotten, the oldest first", () => {
  const digests = Array.from({ length: 20 }, (_, number) => `${number}`)
  usePictures.setState({ pixels: new Map(digests.map((digest) => [digest, pixels])) })
  forgetUnused(new Set(["0", "1"]))
  expect([...usePictures.getState().pixels.keys()]).toEqual(["0", "1", ...digests.slice(-12)])
})
