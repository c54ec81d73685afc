import { useEffect, useId } from "react"
import { putDown, type Tool, useDesk } from "../canvas/view"
import { type Piece, pictureOf } from "../document"
import { NumberField } from "../inspector/Fields"
import { useModels } from "../models"
import { usePictures } from "../pictures"
import { selectedPieces, useStudio } from "../store"
import { Button } from "../ui/Button"
import { words } from "../words"
import { prepare } from "./brush"
import { applyCrop, startCrop, useCropping, within } from "./cropping"
import { cutOut, useCutOut } from "./cutout"
import { canSelect, startSelect, useSelecting } from "./selecting"

/** What cuts the selected layer's picture: background, brush, eraser, crop. */
export function MaskTools() {
  useStudio((state) => state.selection)
  useStudio((state) => state.document)
  const tool = useDesk((desk) => desk.tool)
  const { isOffered, busy } = useCutOut()
  const canPoint = useModels(canSelect)
  const pieces = selectedPieces(useStudio.getState())
  const [piece] = pieces
  const { mask } = words
  // Another layer, another crop and another object.
  useEffect(() => {
    if (useCropping.getState().id && useCropping.getState().id !== piece?.id) putDown()
    if (useSelecting.getState().id && useSelecting.getState().id !== piece?.id) putDown()
  }, [piece?.id])
  useEffect(() => {
    if (tool === "brush") prepare(piece)
  }, [tool, piece])
  if (!piece || pieces.length > 1) return null
  const toggle = (wanted: Tool) => {
    if (tool === wanted) putDown()
    else if (wanted === "crop") startCrop(piece)
    else if (wanted === "select") startSelect(piece)
    else useDesk.setState({ tool: wanted })
  }
  return (
    <>
      {isOffered && (
        <Button
          isWide
          icon="cut"
          name={busy === piece.id ? mask.removing : mask.remove}
          disabled={busy !== "" || piece.locked}
          onClick={() => void cutOut(piece)}
        />
      )}
      {([...(canPoint ? ["select" as const] : []), "eraser", "brush", "crop"] as const).map(
        (each) => (
          <Button
            key={each}
            icon={each}
            name={mask[each]}
            disabled={piece.locked}
            aria-pressed={tool === each}
            className={tool === each ? "on" : ""}
            onClick={() => toggle(each)}
          />
        ),
      )}
      <span className="gap" />
    </>
  )
}

/** The settings of the tool in hand, below the other tools. */
export function ToolSettings() {
  const { tool, brush, softness } = useDesk()
  useStudio((state) => state.document)
  const [piece] = selectedPieces(useStudio.getState())
  const id = useId()
  const { mask } = words
  if (tool === "move") return null
  if (tool === "select") return <SelectSettings />
  if (tool === "crop") return piece ? <CropSettings piece={piece} /> : null
  return (
    <div className="floating second" role="toolbar" aria-label={mask[tool]}>
      <label htmlFor={`${id}-size`}>
        {mask.size}
        <input
          id={`${id}-size`}
          type="range"
          min={0.5}
          max={60}
          step={0.5}
          value={brush}
          onChange={(event) => useDesk.setState({ brush: event.target.valueAsNumber })}
        />
      </label>
      <label htmlFor={`${id}-soft`}>
        {mask.softness}
        <input
          id={`${id}-soft`}
          type="range"
          min={0}
          max={1}
          step={0.05}
          value={softness}
          onChange={(event) => useDesk.setState({ softness: event.target.valueAsNumber })}
        />
      </label>
      <button type="button" className="plain" onClick={putDown}>
        {mask.done}
      </button>
    </div>
  )
}

/** What to do to select an object. */
function SelectSettings() {
  const { isBusy } = useSelecting()
  const { mask } = words
  return (
    <div className="floating second" role="toolbar" aria-label={mask.select}>
      <span>{isBusy ? mask.selecting : mask.selectHint}</span>
      <button type="button" className="plain" onClick={putDown}>
        {mask.done}
      </button>
    </div>
  )
}

/** The crop in numbers, for who has no pointer. */
function CropSettings({ piece }: { piece: Piece }) {
  const { box } = useCropping()
  const pixels = usePictures((state) => state.pixels.get(pictureOf(piece.layer)))
  const { mask } = words
  if (!pixels) return null
  const side = (name: keyof typeof box, value: number | undefined) =>
    value !== undefined && useCropping.setState({ box: within({ ...box, [name]: value }, pixels) })
  return (
    <div className="floating second" role="toolbar" aria-label={mask.crop}>
      {(["left", "top", "right", "bottom"] as const).map((name) => (
        <NumberField
          key={name}
          label={mask[name]}
          value={box[name]}
          digits={0}
          min={0}
          max={name === "left" || name === "right" ? pixels.width : pixels.height}
          set={(value) => side(name, value)}
        />
      ))}
      <button type="button" className="primary" onClick={() => void applyCrop()}>
        {mask.apply}
      </button>
      <button type="button" className="plain" onClick={putDown}>
        {mask.cancel}
      </button>
    </div>
  )
}
