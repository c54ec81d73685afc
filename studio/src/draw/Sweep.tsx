import { useState } from "react"
import { useModel } from "../models"
import { layerPlan, usePlan } from "../plan"
import { useDocument } from "../store"
import { words } from "../words"
import { openResults } from "./looking"
import { type Dial, drawSweep, redoable, values } from "./work"

const said = words.sweep
const OF_LAYERS = ["noise", "attract", "repel"] as const
const MOST = 8

/** One dial through several values, drawn side by side from one seed. */
export function Sweep() {
  const document = useDocument()
  const model = useModel()
  const planned = usePlan()
  const pieces = redoable(document)
  const dials: Dial[] = [
    ...pieces.toReversed().flatMap(({ id }) => OF_LAYERS.map((name) => ({ name, piece: id }))),
    { name: "guidanceScale" },
    { name: "steps" },
  ]
  const keyOf = (dial: Dial) => `${dial.name} ${dial.piece ?? ""}`
  const [key, setKey] = useState("")
  const dial = dials.find((each) => keyOf(each) === key) ?? (dials[0] as Dial)
  const [low, high, step] = range(dial, model?.maxSteps)
  const [from, setFrom] = useState<number>()
  const [to, setTo] = useState<number>()
  const [count, setCount] = useState(4)
  const first = from ?? low
  const last = to ?? high
  const all = values(dial, first, last, count)
  const choose = (next: string) => {
    setKey(next)
    setFrom(undefined)
    setTo(undefined)
  }
  const piece = pieces.find(({ id }) => id === dial.piece)
  const now = piece && OF_LAYERS.includes(dial.name as "noise") && layerPlan(planned, piece)
  const nameOf = ({ name, piece: id }: Dial) => {
    const owner = pieces.find((each) => each.id === id)?.layer.name ?? said.whole
    return `${owner}: ${words.versions.settings[name]}`
  }
  return (
    <form
      className="sweep-form"
      onSubmit={(event) => {
        event.preventDefault()
        void drawSweep(document, dial, all).then(([one]) => one && openResults({ version: one.id }))
      }}
    >
      <label>
        {said.dial}
        <select value={keyOf(dial)} onChange={(event) => choose(event.target.value)}>
          {dials.map((each) => (
            <option key={keyOf(each)} value={keyOf(each)}>
              {nameOf(each)}
            </option>
          ))}
        </select>
      </label>
      <Field text={said.from} value={first} set={setFrom} low={low} high={high} step={step} />
      <Field text={said.to} value={last} set={setTo} low={low} high={high} step={step} />
      <Field text={said.count} value={count} set={setCount} low={2} high={MOST} step={1} />
      <button type="submit" className="primary" disabled={pieces.length === 0 || all.length < 2}>
        {said.draw}
      </button>
      <p className="hint">
        {said.draws(all.join(", "))}
        {now ? ` ${said.now(now[dial.name as "noise"])}` : ""}
      </p>
    </form>
  )
}

function range(dial: Dial, maxSteps = 50): [low: number, high: number, step: number] {
  if (dial.name === "steps") return [5, Math.min(50, maxSteps), 1]
  if (dial.name === "guidanceScale") return [1, 12, 0.5]
  return [0, 1, 0.05]
}

function Field(props: {
  text: string
  value: number
  set: (value: number) => void
  low: number
  high: number
  step: number
}) {
  return (
    <label>
      {props.text}
      <input
        type="number"
        min={props.low}
        max={props.high}
        step={props.step}
        value={props.value}
        onChange={(event) => {
          const value = event.target.valueAsNumber
          if (value >= props.low && value <= props.high) props.set(value)
        }}
      />
    </label>
  )
}
