import { useEffect } from "react"
import type { Piece } from "../document"
import { setLayers } from "../edits"
import type { Appearance as Look } from "../gen/collage/v1/collage_pb"
import { useStudio } from "../store"
import { Button } from "../ui/Button"
import { words } from "../words"
import { Dial, NumberField, Part, Remarks } from "./Fields"
import { learnNow, loadWords, stopLearning, useLearning, useWords } from "./learning"
import { appearanceSketch } from "./Sketch"

const LEARN = "learn"

/** The learned word that stands before the layer's text: none, one to be learned, or a stored one. */
export function Appearance({ piece }: { piece: Piece }) {
  const { appearance, name } = piece.layer
  const stored = useWords((state) => state.words)
  useEffect(() => void loadWords(), [])
  const { inspector } = words
  const source = appearance?.source
  const chosen = source?.case === "word" ? source.value : source?.case === "learn" ? LEARN : ""
  const set = (next: Look | undefined, key: string) =>
    useStudio
      .getState()
      .change(
        words.edits.dial(inspector.appearance, name),
        setLayers([piece.id], { appearance: next }),
        `appearance ${piece.id} ${key}`,
      )
  const choose = (value: string) => {
    if (!value) return set(undefined, value)
    const { weight, vectors } = appearance ?? {}
    set(
      {
        $typeName: "collage.v1.Appearance",
        source: value === LEARN ? { case: "learn", value: true } : { case: "word", value },
        weight,
        vectors: value === LEARN ? vectors : undefined,
      },
      value,
    )
  }
  return (
    <Part title={inspector.appearance}>
      <p className="help">{inspector.appearanceHelp}</p>
      <label className="field">
        <span>{inspector.word}</span>
        <select value={chosen} onChange={(event) => choose(event.target.value)}>
          <option value="">{inspector.noWord}</option>
          <option value={LEARN}>{inspector.learnWord}</option>
          {stored.map((word) => (
            <option key={word.name} value={word.name}>
              {inspector.storedWord(word.text, word.name)}
            </option>
          ))}
          {source?.case === "word" && !stored.some((word) => word.name === source.value) && (
            <option value={source.value}>{source.value}</option>
          )}
        </select>
      </label>
      {appearance && (
        <>
          <Dial
            label={inspector.weight}
            help={inspector.weightHelp}
            picture={appearanceSketch}
            value={appearance.weight ?? 1}
            max={2}
            set={(weight) => set({ ...appearance, weight }, "weight")}
          />
          {chosen === LEARN && (
            <>
              <NumberField
                label={inspector.vectors}
                value={appearance.vectors}
                automatic="1"
                digits={0}
                min={1}
                max={8}
                set={(vectors) =>
                  set({ ...appearance, vectors: vectors && Math.round(vectors) }, "vectors")
                }
              />
              <p className="help">{inspector.vectorsHelp}</p>
              <Learn piece={piece} />
            </>
          )}
        </>
      )}
      <Remarks piece={piece.id} field="appearance" />
    </Part>
  )
}

/** Learns the word now, with what of it is done and how far it is off. */
function Learn({ piece }: { piece: Piece }) {
  const learning = useLearning((state) => state.of.get(piece.id))
  const { inspector } = words
  if (learning?.state !== "running")
    return (
      <div className="learn">
        <button type="button" className="plain" onClick={() => void learnNow(piece)}>
          {inspector.learnNow}
        </button>
        {learning && (
          <p className={learning.state === "failed" ? "remark error" : "help"}>
            {learning.state === "failed" ? learning.message : inspector.learned}
          </p>
        )}
      </div>
    )
  const { step, total, losses } = learning
  return (
    <div className="learn">
      <div className="dial-line">
        <progress value={step} max={total || 1} aria-label={inspector.learning} />
        <Button icon="close" name={inspector.stopLearning} onClick={() => stopLearning(piece.id)} />
      </div>
      <p className="help">{inspector.learningStep(step, total, losses.at(-1))}</p>
      <Curve values={losses} />
    </div>
  )
}

/** The losses so far, as a line. */
function Curve({ values }: { values: readonly number[] }) {
  if (values.length < 2) return null
  const top = Math.max(...values)
  const bottom = Math.min(...values)
  const points = values
    .map((value, index) => {
      const x = (index / (values.length - 1)) * 100
      const y = 28 - ((value - bottom) / (top - bottom || 1)) * 26
      return `${x.toFixed(1)},${y.toFixed(1)}`
    })
    .join(" ")
  return (
    <svg className="curve" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">
      <polyline points={points} vectorEffect="non-scaling-stroke" />
    </svg>
  )
}
