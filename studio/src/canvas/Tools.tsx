import { useRef, useState } from "react"
import * as acts from "../acts"
import { addFiles } from "../intake"
import { MaskTools } from "../mask/MaskTools"
import { useModel } from "../models"
import { useDocument, useHistory, useStudio } from "../store"
import { Button } from "../ui/Button"
import { words } from "../words"
import { ArtShelf } from "./Art"
import { Keys } from "./Keys"
import { type Overlay, showAll, useDesk, useView, zoomIn, zoomOut } from "./view"

/** What the whole collage is done with: undo, and pictures in. */
export function Tools() {
  const past = useHistory((state) => state.pastStates.length)
  const future = useHistory((state) => state.futureStates.length)
  const files = useRef<HTMLInputElement>(null)
  const opener = useRef<HTMLButtonElement>(null)
  const [isOpen, setOpen] = useState(false)
  const limit = useModel()?.maxLayers || undefined
  return (
    <>
      <Button icon="undo" name={words.tools.undo} disabled={!past} onClick={acts.takeBack} />
      <Button icon="redo" name={words.tools.redo} disabled={!future} onClick={acts.doAgain} />
      <span className="gap" />
      <Button isWide icon="add" name={words.tools.add} onClick={() => files.current?.click()} />
      <input
        ref={files}
        type="file"
        accept="image/*"
        multiple
        hidden
        data-testid="files"
        onChange={(event) => {
          void addFiles([...(event.target.files ?? [])], { limit })
          event.target.value = ""
        }}
      />
      <Button
        isWide
        ref={opener}
        icon="picture"
        name={words.tools.art}
        aria-expanded={isOpen}
        onClick={() => setOpen(!isOpen)}
      />
      <Keys />
      {isOpen && <ArtShelf opener={opener} close={() => setOpen(false)} />}
    </>
  )
}

/** What is done with the selected layers, above the canvas. */
export function SelectionTools() {
  const selection = useStudio((state) => state.selection)
  if (selection.length === 0) return null
  const { tools } = words
  return (
    <div className="floating top" role="toolbar" aria-label={tools.selection}>
      <MaskTools />
      <Button icon="copy" name={tools.duplicate} onClick={acts.duplicateSelected} />
      <Button icon="trash" name={tools.remove} onClick={acts.removeSelected} />
      <span className="gap" />
      <Button
        icon="flipH"
        name={tools.flipHorizontal}
        onClick={() => acts.flipSelected("flipHorizontal")}
      />
      <Button
        icon="flipV"
        name={tools.flipVertical}
        onClick={() => acts.flipSelected("flipVertical")}
      />
      <span className="gap" />
      <Button icon="up" name={tools.front} onClick={() => acts.stepSelected(1)} />
      <Button icon="down" name={tools.back} onClick={() => acts.stepSelected(-1)} />
      <Button icon="group" name={tools.group} onClick={acts.toggleGroup} />
    </div>
  )
}

/** Zoom, and what of the plan lies over the collage. */
export function ViewTools() {
  const { size, pieces } = useDocument()
  const hasControl = pieces.some(({ layer }) => layer.structure.some(({ image }) => image))
  const scale = useView((view) => view.scale)
  const overlay = useDesk((desk) => desk.overlay)
  const { tools, canvas } = words
  // Control pictures that the service draws are not told by its plan.
  const shown = (Object.keys(canvas.overlays) as Overlay[]).filter(
    (key) => key !== "control" || hasControl || overlay === key,
  )
  return (
    <div className="floating bottom" role="toolbar" aria-label={tools.view}>
      <Button icon="zoomOut" name={tools.zoomOut} onClick={zoomOut} />
      <output className="zoom">{tools.zoom(Math.round(scale * 100))}</output>
      <Button icon="zoomIn" name={tools.zoomIn} onClick={zoomIn} />
      <Button icon="fit" name={tools.fit} onClick={() => showAll(size)} />
      <span className="gap" />
      <label>
        {canvas.overlay}
        <select
          value={overlay}
          title={canvas.overlayHelp[overlay]}
          onChange={(event) => useDesk.setState({ overlay: event.target.value as Overlay })}
        >
          {shown.map((key) => (
            <option key={key} value={key}>
              {canvas.overlays[key]}
            </option>
          ))}
        </select>
      </label>
    </div>
  )
}
