import { useEffect } from "react"
import * as acts from "../acts"
import type { Piece } from "../document"
import { dab, diameter } from "../mask/brush"
import { applyCrop, startCrop } from "../mask/cropping"
import { moveBrush } from "../mask/pointing"
import { canSelect, pointAt, startSelect } from "../mask/selecting"
import { selectedPieces, useStudio } from "../store"
import { say } from "../voice"
import { words } from "../words"
import { isTyping, keyOf } from "./keys"
import { redrawPieces } from "./PieceNode"
import { putDown, showAll, type Tool, useDesk, zoomIn, zoomOut } from "./view"

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
      // A window has keys of its own.
      if (event.target instanceof Element && event.target.closest("dialog, [popover]")) return
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
  const { tool } = useDesk.getState()
  if (tool !== "move" && inTool(event, key, tool)) return true
  const { selection, select } = useStudio.getState()
  if (key === "Escape") return selection.length > 0 && done(() => select([]))
  if (selection.length === 0) return false
  if (key === "e" || key === "b")
    return done(() => useDesk.setState({ tool: key === "e" ? "eraser" : "brush" }))
  if (key === "o" && canSelect())
    return done(() => startSelect(selectedPieces(useStudio.getState())[0] as Piece))
  if (key === "c") return done(() => startCrop(selectedPieces(useStudio.getState())[0] as Piece))
  if (key === "Delete" || key === "Backspace") return done(acts.removeSelected)
  if (key === "h") return done(() => acts.flipSelected("flipHorizontal"))
  if (key === "j") return done(() => acts.flipSelected("flipVertical"))
  if (key === "l") return done(() => acts.toggleLocked(selection))
  const arrow = ARROWS[event.key]
  if (!arrow || !isOnCanvas(event.target)) return false
  const far = event.shiftKey ? 10 : 1
  return done(() => acts.nudge(arrow[0] * far, arrow[1] * far))
}

/** The keys of the eraser, the brush, the crop and what selects objects while one is in hand. */
function inTool(event: KeyboardEvent, key: string, tool: Tool): boolean {
  if (key === "Escape" || key === "v") return done(putDown)
  if (tool === "crop") return key === "Enter" && isOnCanvas(event.target) && done(applyCrop)
  const { brush, softness } = useDesk.getState()
  const grown = key === "]" ? 1.2 : key === "[" ? 1 / 1.2 : 0
  if (grown && event.shiftKey)
    return done(() =>
      useDesk.setState({ softness: Math.min(Math.max(softness + (grown > 1 ? 0.1 : -0.1), 0), 1) }),
    )
  if (grown)
    return done(() => useDesk.setState({ brush: Math.min(Math.max(brush * grown, 0.5), 60) }))
  if (!isOnCanvas(event.target)) return false
  const arrow = ARROWS[event.key]
  if (arrow) {
    const step = diameter() * (event.shiftKey ? 1 : 0.2)
    const { x, y } = moveBrush(arrow[0] * step, arrow[1] * step)
    const told = tool === "select" ? words.mask.pointerAt : words.mask.brushAt
    return done(() => say(told(Math.round(x), Math.round(y))))
  }
  if (key !== "Enter") return false
  const here = moveBrush(0, 0)
  return done(() => (tool === "select" ? pointAt(here, event.shiftKey) : dab(here, redrawPieces)))
}

function done(act: () => unknown): true {
  act()
  return true
}

/** Arrows move layers where nothing else listens to them. */
function isOnCanvas(target: EventTarget | null): boolean {
  return target === document.body || (target instanceof Element && target.matches(".stage"))
}
