import { useEffect } from "react"
import * as acts from "../acts"
import { useStudio } from "../store"
import { isTyping, keyOf } from "./keys"
import { showAll, useDesk, zoomIn, zoomOut } from "./view"

const ARROWS: Record<string, readonly [number, number]> = {
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
}

/** The page's keys. What is being typed keeps its own, but for undo: there is one history. */
export function useKeys(): void {
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      if (event.defaultPrevented || event.isComposing) return
      if (does(event)) event.preventDefault()
    }
    window.addEventListener("keydown", press)
    return () => window.removeEventListener("keydown", press)
  }, [])
}

/** Answers whether the key did something. */
function does(event: KeyboardEvent): boolean {
  const key = keyOf(event)
  if (event.ctrlKey || event.metaKey) {
    if (event.altKey) return false
    if (key === "z") return done(event.shiftKey ? acts.doAgain : acts.takeBack)
    if (key === "y") return done(acts.doAgain)
    if (isTyping(event.target)) return false
    if (key === "a") return done(acts.selectAll)
    if (key === "d") return done(acts.duplicateSelected)
    if (key === "g") return done(acts.toggleGroup)
    if (key === "]") return done(() => acts.stepSelected(1))
    if (key === "[") return done(() => acts.stepSelected(-1))
    return false
  }
  if (isTyping(event.target) || event.altKey) return false
  if (key === "+") return done(zoomIn)
  if (key === "-") return done(zoomOut)
  if (key === "0") return done(() => showAll(useStudio.getState().document.size))
  if (key === "Escape" && useDesk.getState().tool !== "move")
    return done(() => useDesk.setState({ tool: "move" }))
  const { selection, select } = useStudio.getState()
  if (key === "Escape") return selection.length > 0 && done(() => select([]))
  if (selection.length === 0) return false
  if (key === "Delete" || key === "Backspace") return done(acts.removeSelected)
  if (key === "h") return done(() => acts.flipSelected("flipHorizontal"))
  if (key === "j") return done(() => acts.flipSelected("flipVertical"))
  if (key === "l") return done(() => acts.toggleLocked(selection))
  const arrow = ARROWS[event.key]
  if (!arrow || !isOnCanvas(event.target)) return false
  const far = event.shiftKey ? 10 : 1
  return done(() => acts.nudge(arrow[0] * far, arrow[1] * far))
}

function done(act: () => unknown): true {
  act()
  return true
}

/** Arrows move layers where nothing else listens to them. */
function isOnCanvas(target: EventTarget | null): boolean {
  return target === document.body || (target instanceof Element && target.matches(".stage"))
}
