import { type KeyboardEvent, useId, useLayoutEffect, useRef, useState } from "react"
import { setScene } from "../edits"
import { usePlan } from "../plan"
import { useDocument, useStudio } from "../store"
import { words } from "../words"
import { filled, offers, openAt, parts } from "./chips"
import { Remarks } from "./Fields"

/** The scene's words: placeholders show as chips, "{" offers names, and a button for each layer puts its own in. */
export function Prompt() {
  const { prompt, pieces } = useDocument()
  const names = pieces.map(({ layer }) => layer.name)
  const field = useRef<HTMLTextAreaElement>(null)
  const mirror = useRef<HTMLDivElement>(null)
  const wanted = useRef<number>(undefined)
  const [caret, setCaret] = useState<number>()
  const [chosen, setChosen] = useState(0)
  const [isShut, setShut] = useState(false)
  const id = useId()
  const open = caret === undefined || isShut ? undefined : openAt(prompt, caret)
  const list = open ? offers(names, open.typed) : []
  const active = Math.min(chosen, list.length - 1)

  const change = (next: string, at?: number) => {
    wanted.current = at
    useStudio.getState().change(words.edits.prompt, setScene({ prompt: next }), "prompt")
  }
  // biome-ignore lint/correctness/useExhaustiveDependencies: the caret goes where the new text wants it
  useLayoutEffect(() => {
    const element = field.current
    if (!element) return
    element.style.height = "auto"
    element.style.height = `${element.scrollHeight + 2}px`
    if (wanted.current === undefined) return
    element.focus()
    element.setSelectionRange(wanted.current, wanted.current)
    setCaret(wanted.current)
    wanted.current = undefined
  }, [prompt])
  const insert = (name: string) => {
    const element = field.current
    const start = open?.start ?? element?.selectionStart ?? prompt.length
    const end = open ? (caret ?? start) : (element?.selectionEnd ?? start)
    const next = filled(prompt, start, end, name)
    change(next.prompt, next.caret)
  }
  const press = (event: KeyboardEvent) => {
    if (list.length === 0) return
    if (event.key === "ArrowDown") setChosen((active + 1) % list.length)
    else if (event.key === "ArrowUp") setChosen((active + list.length - 1) % list.length)
    else if (event.key === "Enter" || event.key === "Tab") insert(list[active] as string)
    else if (event.key === "Escape") setShut(true)
    else return
    event.preventDefault()
    event.stopPropagation()
  }
  return (
    <div className="prompt">
      <label htmlFor={id}>{words.inspector.prompt}</label>
      <div className="prompt-box">
        <div ref={mirror} className="mirror" aria-hidden="true">
          {parts(prompt, names).map(({ text, kind }, index) => (
            // biome-ignore lint/suspicious/noArrayIndexKey: parts have no other identity
            <span key={index} className={kind}>
              {text}
            </span>
          ))}
        </div>
        <textarea
          ref={field}
          id={id}
          rows={3}
          value={prompt}
          placeholder={words.inspector.promptExample}
          role="combobox"
          aria-autocomplete="list"
          aria-expanded={list.length > 0}
          aria-controls={`${id}-names`}
          aria-activedescendant={list.length ? `${id}-${active}` : undefined}
          aria-describedby={`${id}-help`}
          onChange={(event) => {
            setCaret(event.target.selectionStart)
            setShut(false)
            setChosen(0)
            change(event.target.value)
          }}
          onSelect={(event) => setCaret(event.currentTarget.selectionStart)}
          onBlur={() => setCaret(undefined)}
          onKeyDown={press}
        />
        <div
          id={`${id}-names`}
          role="listbox"
          aria-label={words.inspector.names}
          className="offers"
          hidden={list.length === 0}
        >
          {list.map((name, index) => (
            // biome-ignore lint/a11y/useKeyWithClickEvents: the field has the focus and its keys choose
            <div
              key={name}
              id={`${id}-${index}`}
              role="option"
              tabIndex={-1}
              aria-selected={index === active}
              // The field keeps the focus.
              onPointerDown={(event) => event.preventDefault()}
              onClick={() => insert(name)}
            >
              {name}
            </div>
          ))}
        </div>
      </div>
      <p id={`${id}-help`} className="help">
        {words.inspector.promptHelp}
      </p>
      <div className="chips">
        {names.map((name) => (
          <button
            key={name}
            type="button"
            className={prompt.includes(`{${name}}`) ? "chip spoken" : "chip"}
            aria-label={words.inspector.insert(name)}
            onPointerDown={(event) => event.preventDefault()}
            onClick={() => insert(name)}
          >
            {name}
          </button>
        ))}
      </div>
      <Remarks field="prompt" />
      <Reading />
    </div>
  )
}

/** What the model reads, and how much of what it can. */
function Reading() {
  const plan = usePlan((state) => state.plan)
  if (!plan) return null
  const { prompt, promptTokens, promptTokensLimit } = plan
  return (
    <details className="reading">
      <summary>{words.inspector.reads(promptTokens, promptTokensLimit)}</summary>
      <p>{prompt}</p>
    </details>
  )
}
