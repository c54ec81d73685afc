// Pictures under a brush: what the canvas draws in a piece's place until the stroke is a picture of its own.

const shown = new Map<string, HTMLCanvasElement>()

export function paintedOver(id: string): HTMLCanvasElement | undefined {
  return shown.get(id)
}

export function showPainted(id: string, canvas: HTMLCanvasElement | undefined): void {
  if (canvas) shown.set(id, canvas)
  else shown.delete(id)
}
