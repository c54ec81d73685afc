import { useRef } from "react"
import { act } from "../acts"
import { colour, type Extent, GREY } from "../document"
import { resize, setBackground, setSampling, setScene } from "../edits"
import type { Sampling } from "../gen/collage/v1/collage_pb"
import type { Model } from "../gen/collage/v1/collage_service_pb"
import { addBackground } from "../intake"
import { useModel, useModels } from "../models"
import { remarks, usePlan } from "../plan"
import { useDocument, useStudio } from "../store"
import { Button } from "../ui/Button"
import { words } from "../words"
import { NumberField, Part, Remarks, SeedField, Told } from "./Fields"
import { Prompt } from "./Prompt"
import { allowed, sizesOf } from "./sizes"

/** What the whole picture is told: words, canvas, ground, model. */
export function Scene() {
  const { negativePrompt } = useDocument()
  const { inspector } = words
  const general = remarks(usePlan()).filter(({ piece, field }) => !piece && !KNOWN.test(field))
  return (
    <>
      {general.map((remark) => (
        <Told key={remark.message} remark={remark} />
      ))}
      <Prompt />
      <label className="field tall">
        <span>{inspector.negative}</span>
        <textarea
          rows={2}
          value={negativePrompt}
          onChange={(event) =>
            useStudio
              .getState()
              .change(
                words.edits.negative,
                setScene({ negativePrompt: event.target.value }),
                "negative",
              )
          }
        />
      </label>
      <CanvasSize />
      <Ground />
      <Drawing />
    </>
  )
}

// Fields of the scene that have a place of their own below.
const KNOWN = /^(prompt|size|steps|guidance_scale|seed|sampler|model|background)/

function CanvasSize() {
  const { size } = useDocument()
  const model = useModel()
  const { inspector } = words
  const change = (next: Extent) => {
    if (next.width !== size.width || next.height !== size.height)
      act(words.edits.size, resize(next))
  }
  const offered = model ? sizesOf(model) : []
  const key = ({ width, height }: Extent) => `${width} × ${height}`
  const isOffered = offered.some((each) => key(each) === key(size))
  const side = (value: number | undefined) =>
    value === undefined ? size.width : model ? allowed(value, model) : value
  const step = model?.sizeMultiple || 1
  return (
    <Part title={inspector.canvas}>
      {offered.length > 1 && (
        <label className="field">
          <span>{inspector.size}</span>
          <select
            value={isOffered ? key(size) : ""}
            onChange={(event) => {
              const next = offered.find((each) => key(each) === event.target.value)
              if (next) change(next)
            }}
          >
            {!isOffered && <option value="">{inspector.ownSize}</option>}
            {offered.map((each) => (
              <option key={key(each)} value={key(each)}>
                {inspector.shape(each.width, each.height)}
              </option>
            ))}
          </select>
        </label>
      )}
      <div className="pair">
        <NumberField
          label={inspector.width}
          value={size.width}
          step={step}
          min={model?.minSide}
          max={model?.maxSide}
          set={(width) => change({ ...size, width: side(width) })}
        />
        <NumberField
          label={inspector.height}
          value={size.height}
          step={step}
          min={model?.minSide}
          max={model?.maxSide}
          set={(height) => change({ ...size, height: side(height) })}
        />
      </div>
      <Remarks field="size" />
    </Part>
  )
}

function Ground() {
  const { kind } = useDocument().background
  const file = useRef<HTMLInputElement>(null)
  const { red, green, blue } =
    kind.case === "color" ? kind.value : { red: 150, green: 150, blue: 150 }
  const hex = `#${[red, green, blue].map((value) => value.toString(16).padStart(2, "0")).join("")}`
  const { inspector } = words
  return (
    <Part title={inspector.background}>
      <div className="ground">
        <label className="swatch">
          <input
            type="color"
            value={hex}
            onChange={(event) => {
              const [r, g, b] = [1, 3, 5].map((at) =>
                Number.parseInt(event.target.value.slice(at, at + 2), 16),
              ) as [number, number, number]
              useStudio
                .getState()
                .change(words.edits.background, setBackground(colour(r, g, b)), "ground")
            }}
          />
          {inspector.colour}
        </label>
        <Button
          isWide
          icon="picture"
          name={inspector.groundPicture}
          className={kind.case === "image" ? "on" : ""}
          onClick={() => file.current?.click()}
        />
        <input
          ref={file}
          type="file"
          accept="image/*"
          hidden
          data-testid="background"
          onChange={(event) => {
            const [picked] = event.target.files ?? []
            if (picked) void addBackground(picked)
            event.target.value = ""
          }}
        />
        {kind.case === "image" && (
          <Button
            icon="close"
            name={inspector.noGroundPicture}
            onClick={() => act(words.edits.background, setBackground(GREY))}
          />
        )}
      </div>
      <Remarks field="background" />
    </Part>
  )
}

/** Model, sampler, steps, guidance and seed: each the model's own until it is set. */
function Drawing() {
  const { sampling } = useDocument()
  const models = useModels((state) => state.models)
  const model = useModel()
  const { inspector } = words
  const set = (setting: string, fields: Partial<Sampling>) =>
    useStudio
      .getState()
      .change(words.edits.sampling(setting), setSampling(fields), `sampling ${setting}`)
  const defaults = model?.defaults
  return (
    <Part title={inspector.drawing}>
      {models.length > 1 && (
        <label className="field">
          <span>{inspector.model}</span>
          <select
            value={model?.name ?? ""}
            onChange={(event) =>
              set(inspector.model, {
                model: event.target.value === models[0]?.name ? "" : event.target.value,
              })
            }
          >
            {models.map(({ name }) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
      )}
      <Remarks field="model" />
      {model && model.samplers.length > 1 && (
        <label className="field">
          <span>{inspector.sampler}</span>
          <select
            value={sampling.sampler}
            onChange={(event) => set(inspector.sampler, { sampler: event.target.value })}
          >
            <option value="">{inspector.modelsOwn(defaults?.sampler ?? "")}</option>
            {model.samplers.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
      )}
      <Remarks field="sampler" />
      <div className="pair">
        <NumberField
          label={inspector.steps}
          value={sampling.steps}
          automatic={defaults?.steps === undefined ? "" : String(defaults.steps)}
          digits={0}
          min={1}
          max={model?.maxSteps || 1000}
          set={(steps) => set(inspector.steps, { steps: steps && Math.round(steps) })}
        />
        <NumberField
          label={inspector.guidance}
          value={sampling.guidanceScale}
          automatic={defaults?.guidanceScale === undefined ? "" : String(defaults.guidanceScale)}
          step={0.5}
          min={0}
          max={50}
          set={(guidanceScale) => set(inspector.guidance, { guidanceScale })}
        />
      </div>
      <p className="help">{inspector.samplingHelp}</p>
      <Remarks field="steps" />
      <Remarks field="guidance_scale" />
      <SeedField
        label={inspector.seed}
        value={sampling.seed}
        set={(seed) => set(inspector.seed, { seed })}
      />
      <Remarks field="seed" />
      {model && model.adapters.length > 0 && <Adapters model={model} />}
    </Part>
  )
}

/** Changes of the model's weights (LoRA) to draw with. */
function Adapters({ model }: { model: Model }) {
  const { sampling } = useDocument()
  const { inspector } = words
  const set = (adapters: Sampling["adapters"]) =>
    useStudio
      .getState()
      .change(words.edits.sampling(inspector.adapters), setSampling({ adapters }), "adapters")
  return (
    <fieldset>
      <legend>{inspector.adapters}</legend>
      {model.adapters.map((name) => {
        const used = sampling.adapters.find((adapter) => adapter.name === name)
        const others = sampling.adapters.filter((adapter) => adapter.name !== name)
        return (
          <div key={name} className="pair">
            <label className="check">
              <input
                type="checkbox"
                checked={used !== undefined}
                onChange={(event) =>
                  set(
                    event.target.checked
                      ? [...others, { $typeName: "collage.v1.Adapter", name }]
                      : others,
                  )
                }
              />
              {name}
            </label>
            {used && (
              <NumberField
                label={inspector.weight}
                value={used.weight}
                automatic="1"
                step={0.1}
                min={-2}
                max={2}
                set={(weight) => set([...others, { ...used, weight }])}
              />
            )}
          </div>
        )
      })}
      <Remarks field="adapters" />
    </fieldset>
  )
}
