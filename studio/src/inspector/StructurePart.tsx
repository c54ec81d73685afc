import { useRef } from "react"
import type { Piece } from "../document"
import { backgroundPicture, setLayers } from "../edits"
import type { Structure } from "../gen/collage/v1/collage_pb"
import { take } from "../intake"
import { useModel } from "../models"
import { useStudio } from "../store"
import { Button } from "../ui/Button"
import { words } from "../words"
import { Dial, NumberField, Part, Remarks } from "./Fields"
import { structureSketch } from "./Sketch"

/** ControlNets that act inside the layer: one row for each kind of the model. */
export function StructurePart({ piece }: { piece: Piece }) {
  const model = useModel()
  const { inspector } = words
  if (!model || model.controlKinds.length === 0) return null
  const { structure, name } = piece.layer
  const set = (next: readonly Structure[], key: string) =>
    useStudio
      .getState()
      .change(
        words.edits.dial(inspector.structure, name),
        setLayers([piece.id], { structure: [...next] }),
        `structure ${piece.id} ${key}`,
      )
  const change = (kind: string, fields: Partial<Structure>) =>
    set(
      structure.map((each) => (each.kind === kind ? { ...each, ...fields } : each)),
      kind,
    )
  return (
    <Part title={inspector.structure}>
      <p className="help">{inspector.structureHelp}</p>
      {model.controlKinds.map((kind) => {
        const used = structure.find((each) => each.kind === kind)
        const others = structure.filter((each) => each.kind !== kind)
        const isDrawn = model.drawnControlKinds.includes(kind)
        return (
          <div key={kind} className="structure">
            <label className="check">
              <input
                type="checkbox"
                checked={used !== undefined}
                onChange={(event) =>
                  set(
                    event.target.checked
                      ? [...others, { $typeName: "collage.v1.Structure", kind }]
                      : others,
                    kind,
                  )
                }
              />
              {kind}
            </label>
            {used && (
              <>
                {(!isDrawn || used.image) && (
                  <ControlPicture used={used} isDrawn={isDrawn} change={(f) => change(kind, f)} />
                )}
                <Dial
                  label={inspector.structureScale}
                  help={inspector.structureScaleHelp}
                  picture={structureSketch}
                  value={used.scale ?? 1}
                  set={(scale) => change(kind, { scale })}
                />
                <div className="pair">
                  <NumberField
                    label={inspector.start}
                    value={used.start}
                    automatic="0"
                    step={0.05}
                    min={0}
                    max={used.end ?? 1}
                    set={(start) => change(kind, { start })}
                  />
                  <NumberField
                    label={inspector.end}
                    value={used.end}
                    automatic="1"
                    step={0.05}
                    min={used.start ?? 0}
                    max={1}
                    set={(end) => change(kind, { end })}
                  />
                </div>
                <Dial
                  label={inspector.emphasis}
                  help={inspector.emphasisHelp}
                  value={used.emphasis ?? 0}
                  set={(emphasis) => change(kind, { emphasis })}
                />
              </>
            )}
          </div>
        )
      })}
      <Remarks piece={piece.id} field="structure" />
    </Part>
  )
}

/** For kinds whose control picture the server cannot draw. */
function ControlPicture({
  used,
  isDrawn,
  change,
}: {
  used: Structure
  isDrawn: boolean
  change(fields: Partial<Structure>): void
}) {
  const file = useRef<HTMLInputElement>(null)
  const { inspector } = words
  return (
    <div className="ground">
      <Button
        isWide
        icon="picture"
        className={used.image ? "on" : ""}
        name={inspector.controlPicture}
        onClick={() => file.current?.click()}
      />
      {isDrawn && (
        <Button
          icon="close"
          name={inspector.drawnControl}
          onClick={() => change({ image: undefined })}
        />
      )}
      <input
        ref={file}
        type="file"
        accept="image/*"
        hidden
        onChange={async (event) => {
          const files = [...(event.target.files ?? [])]
          event.target.value = ""
          const [picture] = await take(files)
          const kind = picture && backgroundPicture(picture.ref).kind
          if (kind?.case === "image") change({ image: kind.value })
        }}
      />
    </div>
  )
}
