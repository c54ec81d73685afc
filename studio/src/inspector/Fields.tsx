// Fields of the settings: numbers that are typed, dials that are dragged, and what the service says of them.

import { type ReactNode, useEffect, useId, useRef, useState } from "react"
import { type Remark, remarks, usePlan } from "../plan"
import { Button } from "../ui/Button"
import { Icon } from "../ui/Icon"
import { words } from "../words"

interface NumberProps {
  label: string
  value: number | undefined
  /** Undefined where the field was emptied: only with `automatic`. */
  set(value: number | undefined): void
  min?: number
  max?: number
  step?: number
  digits?: number
  unit?: string
  /** What stands there while there is no value. */
  automatic?: string
  disabled?: boolean
}

/** A number that counts when the field is left, by Enter, or by its arrows. */
export function NumberField({
  label,
  value,
  set,
  min,
  max,
  step = 1,
  digits = 2,
  unit,
  automatic,
  disabled,
}: NumberProps) {
  const shown = value === undefined ? "" : String(Number(value.toFixed(digits)))
  const [typed, setTyped] = useState(shown)
  useEffect(() => setTyped(shown), [shown])
  const commit = (text: string) => {
    if (text === shown) return
    if (text.trim() === "" && automatic !== undefined) return set(undefined)
    const number = Number(text)
    if (text.trim() === "" || !Number.isFinite(number)) return setTyped(shown)
    const bounded = Math.min(Math.max(number, min ?? -Infinity), max ?? Infinity)
    setTyped(String(bounded))
    set(bounded)
  }
  return (
    <label className="field">
      <span>{label}</span>
      <span className="with-unit">
        <input
          type="number"
          inputMode="decimal"
          value={typed}
          placeholder={automatic}
          step={step}
          min={min}
          max={max}
          disabled={disabled}
          onChange={(event) => {
            setTyped(event.target.value)
            // The field's own arrows give no key that is typed.
            const { inputType } = event.nativeEvent as InputEvent
            if (!inputType || inputType === "insertReplacementText") commit(event.target.value)
          }}
          onBlur={(event) => commit(event.target.value)}
          onKeyDown={(event) => event.key === "Enter" && commit(event.currentTarget.value)}
        />
        {unit && <span className="unit">{unit}</span>}
      </span>
    </label>
  )
}

interface DialProps {
  label: string
  help: string
  picture?: (value: number) => ReactNode
  value: number | undefined
  /** What the service chose, where it was left to it and is known; undefined with `isAutomatic` while it is not. */
  chosen?: number
  /** Whether the dial may be left to the service. */
  isAutomatic?: boolean
  set(value: number | undefined): void
  min?: number
  max?: number
  step?: number
  field?: string
  piece?: string
}

/** One dial: its picture, its sentence, its slider and number; automatic shows what it came to. */
export function Dial(props: DialProps) {
  const { label, help, picture, value, chosen, isAutomatic, set, min = 0, max = 1 } = props
  const { step = 0.01, field, piece } = props
  const id = useId()
  const shown = value ?? chosen
  const auto = isAutomatic && value === undefined
  return (
    <div className={auto ? "dial auto" : "dial"}>
      {picture?.(shown ?? (min + max) / 2)}
      <div className="dial-body">
        <div className="dial-line">
          <label htmlFor={id}>{label}</label>
          <output htmlFor={id} className={auto ? "chosen" : ""}>
            {auto ? words.inspector.automatic(shown) : shown?.toFixed(2)}
          </output>
          {isAutomatic && (
            <Button
              icon="auto"
              name={words.inspector.toAutomatic(label)}
              className={auto ? "on" : "faint"}
              aria-pressed={auto}
              onClick={() => set(auto ? (shown ?? (min + max) / 2) : undefined)}
            />
          )}
        </div>
        <input
          id={id}
          type="range"
          min={min}
          max={max}
          step={step}
          value={shown ?? (min + max) / 2}
          aria-describedby={`${id}-help`}
          aria-valuetext={auto ? words.inspector.automatic(shown) : undefined}
          onChange={(event) => set(event.target.valueAsNumber)}
        />
        <p id={`${id}-help`} className="help">
          {help}
        </p>
        {field && <Remarks piece={piece} field={field} />}
      </div>
    </div>
  )
}

/** What the service says of one field of a layer, or of the scene. */
export function Remarks({ piece, field }: { piece?: string; field: string }) {
  const planned = usePlan()
  const told = remarks(planned).filter(
    (remark) => remark.piece === piece && (remark.field === field || below(remark.field, field)),
  )
  return told.map((remark) => <Told key={remark.reason + remark.message} remark={remark} />)
}

const below = (field: string, of: string) =>
  of !== "" && (field.startsWith(`${of}.`) || field.startsWith(`${of}[`))

export function Told({ remark: { kind, message } }: { remark: Remark }) {
  return (
    <p className={`remark ${kind}`}>
      <Icon name="warning" />
      {message}
    </p>
  )
}

/** A part of the settings with a heading. */
export function Part({ title, children }: { title: string; children: ReactNode }) {
  const id = useId()
  return (
    <section className="part" aria-labelledby={id}>
      <h3 id={id}>{title}</h3>
      {children}
    </section>
  )
}

/** A seed: a whole number to 2^64, or left to the server. */
export function SeedField({
  label,
  value,
  set,
}: {
  label: string
  value: bigint | undefined
  set(value: bigint | undefined): void
}) {
  const field = useRef<HTMLInputElement>(null)
  const shown = value === undefined ? "" : String(value)
  const [typed, setTyped] = useState(shown)
  useEffect(() => setTyped(shown), [shown])
  const commit = (text: string) => {
    const digits = text.trim()
    if (digits === shown) return
    if (digits === "") return set(undefined)
    if (!/^\d{1,20}$/.test(digits) || BigInt(digits) >= 1n << 64n) return setTyped(shown)
    set(BigInt(digits))
  }
  return (
    <div className="seed">
      <label className="field">
        <span>{label}</span>
        <input
          ref={field}
          type="text"
          inputMode="numeric"
          value={typed}
          placeholder={words.inspector.random}
          onChange={(event) => setTyped(event.target.value)}
          onBlur={(event) => commit(event.target.value)}
          onKeyDown={(event) => event.key === "Enter" && commit(event.currentTarget.value)}
        />
      </label>
      <Button
        icon="dice"
        name={words.inspector.roll}
        onClick={() => set(BigInt(crypto.getRandomValues(new Uint32Array(1))[0] as number))}
      />
      <Button
        icon="close"
        name={words.inspector.clear(label)}
        disabled={value === undefined}
        onClick={() => set(undefined)}
      />
    </div>
  )
}
