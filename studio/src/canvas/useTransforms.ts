import type Konva from "konva"
import { useRef } from "react"
import { act } from "../acts"
import type { Placement } from "../document"
import { placeAll } from "../edits"
import { useStudio } from "../store"
import { words } from "../words"
import type { Nodes } from "./Canvas"
import { freeze } from "./freeze"

/** What the handles did becomes one edit, when they are let go. */
export function useTransforms({ view, transformer }: Nodes) {
  const turns = useRef(false)
  const melt = useRef(() => {})
  return {
    start: () => {
      turns.current = transformer.current?.getActiveAnchor() === "rotater"
      if (view.current) melt.current = freeze(view.current, transformer.current?.nodes() ?? [])
    },
    end: () => {
      melt.current()
      melt.current = () => {}
      const moved = transformer.current?.nodes() ?? []
      const { pieces } = useStudio.getState().document
      const names = words.names(
        moved.map((node) => pieces.find(({ id }) => id === node.id())?.layer.name ?? ""),
      )
      const name = turns.current ? words.edits.turn(names) : words.edits.scale(names)
      commit(moved, name)
    },
  }
}

/** Where these nodes stand is where their pieces stand. */
export function commit(moved: readonly Konva.Node[], name: string): void {
  const changes = new Map<string, Partial<Placement>>()
  for (const node of moved) {
    const change = { x: node.x(), y: node.y(), rotation: node.rotation(), scale: node.scaleX() }
    changes.set(node.id(), change)
  }
  act(name, placeAll(changes))
}
