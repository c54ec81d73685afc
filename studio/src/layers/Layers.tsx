// The layers as a list of the page, front first: what screen readers read and the keyboard goes through.

import { type KeyboardEvent, useEffect, useRef, useState } from "react"
import * as acts from "../acts"
import { tint } from "../canvas/OverlayNode"
import { useDesk } from "../canvas/view"
import type { Piece } from "../document"
import { rename } from "../edits"
import { type Remark, remarks, usePlan } from "../plan"
import { useDocument, useStudio } from "../store"
import { Button } from "../ui/Button"
import { Icon } from "../ui/Icon"
import { words } from "../words"
import { Thumb } from "./Thumb"

export function Layers() {
  const { pieces } = useDocument()
  const selection = useStudio((state) => state.selection)
  const overlay = useDesk((desk) => desk.overlay)
  const planned = usePlan()
  const told = remarks(planned)
  const list = useRef<HTMLOListElement>(null)
  const [renaming, setRenaming] = useState("")
  /** Before which place of the list, from the front, something dragged would stand. */
  const [gap, setGap] = useState<number>()
  const front = [...pieces].reverse()

  const choose = (id: string, adds: boolean) => {
    const { select } = useStudio.getState()
    if (!adds) select([id])
    else
      select(
        selection.includes(id) ? selection.filter((other) => other !== id) : [...selection, id],
      )
    useDesk.setState({ tab: "layer" })
    acts.saySelection()
  }
  const focus = (index: number) =>
    list.current?.querySelectorAll<HTMLElement>(".row-name")[index]?.focus()

  // What moved in the order keeps the focus where it went; where a row with the focus is gone, the next one has it.
  const keep = useRef("")
  const place = useRef<number>(undefined)
  const count = useRef(0)
  // biome-ignore lint/correctness/useExhaustiveDependencies: after each change of the order
  useEffect(() => {
    if (keep.current) focus(front.findIndex(({ id }) => id === keep.current))
    else if (
      place.current !== undefined &&
      front.length < count.current &&
      document.activeElement === document.body
    )
      focus(Math.min(place.current, front.length - 1))
    keep.current = ""
    count.current = front.length
  }, [pieces])

  const press = (event: KeyboardEvent, piece: Piece, index: number) => {
    const up = event.key === "ArrowUp"
    if (up || event.key === "ArrowDown") {
      event.preventDefault()
      if (event.altKey) {
        keep.current = piece.id
        acts.stepPieces(selection.includes(piece.id) ? selection : [piece.id], up ? 1 : -1)
      } else focus(Math.min(Math.max(index + (up ? -1 : 1), 0), front.length - 1))
    } else if (event.key === "F2") {
      event.preventDefault()
      setRenaming(piece.id)
    } else if (event.key === "Delete" && !selection.includes(piece.id)) {
      useStudio.getState().select([piece.id])
    }
  }

  const drop = (dragged: string) => {
    if (gap === undefined) return
    const ids = selection.includes(dragged) ? selection : [dragged]
    const behind = front.slice(gap).filter(({ id }) => !ids.includes(id)).length
    setGap(undefined)
    acts.putAt(ids, behind)
  }

  return (
    <>
      <header className="panel-head">
        <h2 id="layers-title">{words.layers.title}</h2>
        <span className="tally">{pieces.length}</span>
      </header>
      <p id="layers-help" className="unseen">
        {words.layers.help}
      </p>
      {front.length === 0 && <p className="note">{words.layers.empty}</p>}
      <ol
        ref={list}
        className="rows"
        aria-label={words.layers.frontFirst}
        onFocus={(event) => {
          const rows = [...event.currentTarget.children]
          place.current = rows.findIndex((row) => row.contains(event.target))
        }}
        onBlur={(event) => {
          if (event.relatedTarget) place.current = undefined
        }}
        onDragLeave={(event) => {
          if (!event.currentTarget.contains(event.relatedTarget as Node | null)) setGap(undefined)
        }}
      >
        {front.map((piece, index) => (
          <Row
            key={piece.id}
            piece={piece}
            dot={overlay === "masks" ? tint(pieces.length - 1 - index) : undefined}
            remarks={told.filter((remark) => remark.piece === piece.id)}
            isSelected={selection.includes(piece.id)}
            isRenaming={renaming === piece.id}
            mark={
              gap === index
                ? "before"
                : gap === index + 1 && index === front.length - 1
                  ? "after"
                  : undefined
            }
            choose={(adds) => choose(piece.id, adds)}
            press={(event) => press(event, piece, index)}
            startRename={() => setRenaming(piece.id)}
            endRename={(name) => {
              setRenaming("")
              if (name && name !== piece.layer.name)
                acts.act(words.edits.rename(piece.layer.name), rename(piece.id, name))
              focus(index)
            }}
            over={(isLower) => setGap(isLower ? index + 1 : index)}
            drop={drop}
          />
        ))}
      </ol>
    </>
  )
}

const TYPE = "application/x-collage-layer"

interface RowProps {
  piece: Piece
  dot: string | undefined
  remarks: readonly Remark[]
  isSelected: boolean
  isRenaming: boolean
  mark: "before" | "after" | undefined
  choose(adds: boolean): void
  press(event: KeyboardEvent): void
  startRename(): void
  endRename(name: string): void
  over(isLower: boolean): void
  drop(dragged: string): void
}

function Row({ piece, dot, remarks: told, isSelected, isRenaming, mark, ...does }: RowProps) {
  const { layer, locked, group } = piece
  const { name, text } = layer
  const isHidden = layer.visible === false
  const notes = [
    isHidden && words.layers.hidden,
    locked && words.layers.locked,
    group && words.layers.grouped,
    told.length > 0 && words.layers.warnings(told.length),
  ].filter(Boolean)
  return (
    <li
      className={`row ${isSelected ? "selected" : ""} ${isHidden ? "hidden" : ""} ${mark ?? ""}`}
      draggable={!isRenaming}
      onDragStart={(event) => event.dataTransfer.setData(TYPE, piece.id)}
      onDragOver={(event) => {
        if (!event.dataTransfer.types.includes(TYPE)) return
        event.preventDefault()
        const box = event.currentTarget.getBoundingClientRect()
        does.over(event.clientY > box.top + box.height / 2)
      }}
      onDrop={(event) => {
        event.preventDefault()
        does.drop(event.dataTransfer.getData(TYPE))
      }}
    >
      <div className="row-line">
        {dot && <span className="dot" style={{ background: dot }} />}
        {isRenaming ? (
          <Rename name={name} end={does.endRename} />
        ) : (
          <button
            type="button"
            className="row-name"
            aria-pressed={isSelected}
            aria-describedby="layers-help"
            onClick={(event) => does.choose(event.shiftKey || event.ctrlKey || event.metaKey)}
            onDoubleClick={does.startRename}
            onKeyDown={does.press}
          >
            <Thumb piece={piece} />
            <span className="row-words">
              <b>{name}</b>
              <span>{text}</span>
            </span>
            <span className="unseen">{notes.join(", ")}</span>
          </button>
        )}
        <Button
          icon={isHidden ? "eyeOff" : "eye"}
          name={isHidden ? words.layers.show(name) : words.layers.hide(name)}
          className={isHidden ? "on" : "faint"}
          onClick={() => acts.toggleVisible([piece.id])}
        />
        <Button
          icon={locked ? "lock" : "unlock"}
          name={locked ? words.layers.unlock(name) : words.layers.lock(name)}
          className={locked ? "on" : "faint"}
          onClick={() => acts.toggleLocked([piece.id])}
        />
      </div>
      {told.map(({ kind, field, message }) => (
        <p key={field + message} className={`remark ${kind}`}>
          <Icon name="warning" />
          {message}
        </p>
      ))}
    </li>
  )
}

function Rename({ name, end }: { name: string; end(name: string): void }) {
  const field = useRef<HTMLInputElement>(null)
  useEffect(() => field.current?.select(), [])
  return (
    <input
      ref={field}
      className="row-rename"
      defaultValue={name}
      maxLength={64}
      aria-label={words.layers.name(name)}
      onBlur={(event) => end(event.target.value.trim())}
      onKeyDown={(event) => {
        if (event.key === "Enter") end(event.currentTarget.value.trim())
        if (event.key === "Escape") end("")
        event.stopPropagation()
      }}
    />
  )
}
