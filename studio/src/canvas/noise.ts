// The noise map as the service makes it (services/compositor/noise.py: strength_map), to look at.

/** A layer's soft visible mask, 0 to 1, row by row of the canvas, and its noise. */
export interface Painted {
  readonly mask: Float32Array
  readonly noise: number
}

// Standard deviation of the blur, as a fraction of the canvas' shorter side.
const BLUR = 10 / 512
// The blur's kernel ends after so many standard deviations.
const REACH = 4

/**
 * How freely each latent cell is drawn, 0 to 1, row by row: each noise painted through its mask, where nothing is 1, then
 * blurred, but nowhere freer than painted. Here the blur is of cells, there of pixels: to the eye they are one.
 */
export function noiseMap(
  layers: readonly Painted[],
  { width, height }: { width: number; height: number },
  cell: number,
): { width: number; height: number; values: Float32Array } {
  const [across, down] = [Math.floor(width / cell), Math.floor(height / cell)]
  const painted = new Float32Array(across * down).fill(1)
  for (const { mask, noise } of layers)
    for (let y = 0; y < down * cell; y++)
      for (let x = 0; x < across * cell; x++) {
        const at = Math.floor(y / cell) * across + Math.floor(x / cell)
        painted[at] =
          (painted[at] as number) + ((mask[y * width + x] as number) * (noise - 1)) / cell ** 2
      }
  const deviation = (BLUR * Math.min(width, height)) / cell
  const rows = blurred(painted, across, down, 1, across, deviation)
  const both = blurred(rows, down, across, across, 1, deviation)
  return {
    width: across,
    height: down,
    values: both.map((v, i) => Math.min(v, painted[i] as number)),
  }
}

/** Blurs along lines of `length` values that lie `stride` apart; there are `lines`, `next` apart. Edges repeat outwards. */
function blurred(
  values: Float32Array,
  length: number,
  lines: number,
  stride: number,
  next: number,
  deviation: number,
): Float32Array {
  const reach = Math.ceil(REACH * deviation)
  const weights = Array.from({ length: 2 * reach + 1 }, (_, i) =>
    Math.exp(-0.5 * ((i - reach) / deviation) ** 2),
  )
  const sum = weights.reduce((one, other) => one + other, 0)
  const out = new Float32Array(values.length)
  for (let line = 0; line < lines; line++)
    for (let place = 0; place < length; place++) {
      let total = 0
      for (let i = -reach; i <= reach; i++) {
        const from = Math.min(Math.max(place + i, 0), length - 1)
        total += (weights[i + reach] as number) * (values[line * next + from * stride] as number)
      }
      out[line * next + place * stride] = total / sum
    }
  return out
}
