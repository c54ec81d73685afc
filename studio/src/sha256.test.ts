import { expect, it } from "vitest"
import { sha256, sha256ByHand } from "./sha256"

it("agrees with the browser's at all block edges", async () => {
  for (const length of [0, 1, 3, 55, 56, 63, 64, 65, 119, 120, 1000]) {
    const data = Uint8Array.from({ length }, (_, i) => (i * 7 + length) % 256)
    const hex = Array.from(sha256ByHand(data), (byte) => byte.toString(16).padStart(2, "0")).join(
      "",
    )
    expect(hex).toBe(await sha256(data.buffer))
  }
})
