import { type RefObject, useEffect, useRef } from "react"
import { useDesk, useView } from "../canvas/view"
import { useStudio } from "../store"
import { diameter } from "./brush"
import { useBrushAt } from "./pointing"

// Of what has no breadth, screen pixels.
const POINTER = 12

/** The brush's circle, where the pointer is, or where the keyboard put it; a small one where a click is enough. */
export function BrushCursor({ region }: { region: RefObject<HTMLDivElement | null> }) {
  const circle = useRef<HTMLDivElement>(null)
  const tool = useDesk((desk) => desk.tool)
  const isBrush = tool === "brush" || tool === "eraser" || tool === "select"
  useEffect(() => {
    const element = region.current
    const ring = circle.current
    if (!element || !ring || !isBrush) return
    const draw = () => {
      const { point } = useBrushAt.getState()
      const { x, y, scale } = useView.getState()
      const side = useDesk.getState().tool === "select" ? POINTER : diameter() * scale
      ring.hidden = point === undefined
      if (!point) return
      ring.style.width = `${side}px`
      ring.style.height = `${side}px`
      ring.style.transform = `translate(${x + point.x * scale - side / 2}px, ${y + point.y * scale - side / 2}px)`
    }
    const move = (event: PointerEvent) => {
      const box = element.getBoundingClientRect()
      const { x, y, scale } = useView.getState()
      useBrushAt.setState({
        point: {
          x: (event.clientX - box.left - x) / scale,
          y: (event.clientY - box.top - y) / scale,
        },
      })
    }
    const leave = () => useBrushAt.setState({ point: undefined })
    element.addEventListener("pointermove", move)
    element.addEventListener("pointerleave", leave)
    const ends = [useView, useDesk, useStudio, useBrushAt].map((store) => store.subscribe(draw))
    draw()
    return () => {
      element.removeEventListener("pointermove", move)
      element.removeEventListener("pointerleave", leave)
      for (const end of ends) end()
    }
  }, [region, isBrush])
  return isBrush ? <div ref={circle} className="brush" hidden /> : null
}
