/** An empty canvas to draw on, of at least one pixel. */
export function surface(width: number, height: number): CanvasRenderingContext2D {
  const canvas = document.createElement("canvas")
  canvas.width = Math.max(1, width)
  canvas.height = Math.max(1, height)
  return canvas.getContext("2d") as CanvasRenderingContext2D
}

export async function toPng(canvas: HTMLCanvasElement): Promise<Blob> {
  const blob = await new Promise<Blob | null>((done) => canvas.toBlob(done, "image/png"))
  if (!blob) throw new Error("the picture cannot be encoded")
  return blob
}
