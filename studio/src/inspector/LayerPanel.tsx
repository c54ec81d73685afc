import * as acts from "../acts"
import { type Piece, placement } from "../document"
import { LARGEST_SCALE, place, setLayers } from "../edits"
import type { Layer } from "../gen/collage/v1/collage_pb"
import { layerPlan, usePlan } from "../plan"
import { selectedPieces, useDocument, useStudio } from "../store"
import { Button } from "../ui/Button"
import { words } from "../words"
import { Appearance } from "./Appearance"
import { Dial, NumberField, Part, Remarks, SeedField } from "./Fields"
import { attractSketch, noiseSketch, opacitySketch, repelSketch } from "./Sketch"
import { StructurePart } from "./StructurePart"

/** Words, place and dials of the selected layer; of several, the dials of all of them. */
export function LayerPanel() {
  useStudio((state) => state.selection)
  const { size } = useDocument()
  const pieces = selectedPieces(useStudio.getState())
  const planned = usePlan()
  const [first] = pieces
  const { inspector } = words
  if (!first) return <p className="empty-panel">{inspector.nothing}</p>
  const isOne = pieces.length === 1
  const ids = pieces.map(({ id }) => id)
  const names = words.names(pieces.map(({ layer }) => layer.name))
  const set = (dial: string, fields: Partial<Layer>) =>
    useStudio
      .getState()
      .change(words.edits.dial(dial, names), setLayers(ids, fields), `${dial} ${ids}`)
  const plan = layerPlan(planned, first)
  const { layer } = first
  return (
    <div key={isOne ? first.id : ids.length}>
      <h3 className="which">{names}</h3>
      {isOne && <Words piece={first} />}
      {isOne && <Place piece={first} size={size} />}
      <Part title={inspector.dials}>
        <Dial
          label={inspector.noise}
          help={inspector.noiseHelp}
          picture={noiseSketch}
          value={layer.noise}
          chosen={plan?.noise}
          isAutomatic
          field="noise"
          piece={first.id}
          set={(noise) => set(inspector.noise, { noise })}
        />
        <Dial
          label={inspector.attract}
          help={inspector.attractHelp}
          picture={attractSketch}
          value={layer.attract}
          chosen={plan?.attract}
          isAutomatic
          field="attract"
          piece={first.id}
          set={(attract) => set(inspector.attract, { attract })}
        />
        <Dial
          label={inspector.repel}
          help={inspector.repelHelp}
          picture={repelSketch}
          value={layer.repel}
          chosen={plan?.repel}
          isAutomatic
          field="repel"
          piece={first.id}
          set={(repel) => set(inspector.repel, { repel })}
        />
        <Dial
          label={inspector.opacity}
          help={inspector.opacityHelp}
          picture={opacitySketch}
          value={layer.opacity ?? 1}
          field="opacity"
          piece={first.id}
          set={(opacity) =>
            set(inspector.opacity, { opacity: opacity === 1 ? undefined : opacity })
          }
        />
      </Part>
      {isOne && <StructurePart piece={first} />}
      {isOne && <Appearance piece={first} />}
      <Part title={inspector.seed}>
        <SeedField
          label={inspector.layerSeed}
          value={layer.seed}
          set={(seed) => set(inspector.seed, { seed })}
        />
        <p className="help">{inspector.layerSeedHelp}</p>
      </Part>
    </div>
  )
}

function Words({ piece }: { piece: Piece }) {
  const { name, text } = piece.layer
  return (
    <>
      <label className="field tall">
        <span>{words.inspector.text}</span>
        <input
          type="text"
          value={text}
          maxLength={300}
          onChange={(event) =>
            useStudio
              .getState()
              .change(
                words.edits.text(name),
                setLayers([piece.id], { text: event.target.value }),
                `text ${piece.id}`,
              )
          }
        />
      </label>
      <p className="help">{words.inspector.textHelp(name)}</p>
      <Remarks piece={piece.id} field="text" />
      <Remarks piece={piece.id} field="" />
    </>
  )
}

function Place({ piece, size }: { piece: Piece; size: { width: number; height: number } }) {
  const at = placement(piece.layer, size)
  const { inspector } = words
  const put = (change: Parameters<typeof place>[1], what: "move" | "scale" | "turn") =>
    acts.act(words.edits[what](piece.layer.name), place(piece.id, change))
  const disabled = piece.locked
  return (
    <Part title={inspector.place}>
      <div className="pair">
        <NumberField
          label={inspector.x}
          value={at.x}
          disabled={disabled}
          set={(x) => put({ x }, "move")}
        />
        <NumberField
          label={inspector.y}
          value={at.y}
          disabled={disabled}
          set={(y) => put({ y }, "move")}
        />
        <NumberField
          label={inspector.scale}
          value={at.scale * 100}
          unit="%"
          digits={1}
          min={0.1}
          max={LARGEST_SCALE * 100}
          disabled={disabled}
          set={(percent) => put({ scale: (percent ?? 100) / 100 }, "scale")}
        />
        <NumberField
          label={inspector.rotation}
          value={at.rotation}
          unit="°"
          digits={1}
          min={-360}
          max={360}
          disabled={disabled}
          set={(rotation) => put({ rotation }, "turn")}
        />
      </div>
      <div className="flips">
        <Button
          icon="flipH"
          name={words.tools.flipHorizontal}
          aria-pressed={at.flipHorizontal}
          className={at.flipHorizontal ? "on" : ""}
          disabled={disabled}
          onClick={() => acts.flipSelected("flipHorizontal")}
        />
        <Button
          icon="flipV"
          name={words.tools.flipVertical}
          aria-pressed={at.flipVertical}
          className={at.flipVertical ? "on" : ""}
          disabled={disabled}
          onClick={() => acts.flipSelected("flipVertical")}
        />
        {disabled && <span className="help">{inspector.isLocked}</span>}
      </div>
      <Remarks piece={piece.id} field="transform" />
    </Part>
  )
}
