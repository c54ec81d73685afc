import "./export.css"
import { useRef } from "react"
import { emptyDocument } from "../document"
import { trouble } from "../server"
import { useDocument, useStudio } from "../store"
import { useVersions } from "../versions/versions"
import { tell } from "../voice"
import { words } from "../words"
import { asCommand, asJson, asPython } from "./copy"
import { type Form, OPENED, openFile, pickedPicture, save, written } from "./files"

const said = words.export
const MENU = "export-menu"
const FORMS: readonly Form[] = ["ora", "psd", "zip"]
const NAME = "collage"

/** Files in and out, and the collage as text for other tools. */
export function Export() {
  const document = useDocument()
  useVersions((state) => state.versions)
  const menu = useRef<HTMLDivElement>(null)
  const input = useRef<HTMLInputElement>(null)
  const close = () => menu.current?.hidePopover()
  const attempt = (work: () => Promise<void>) => () => {
    close()
    work().catch((error) => tell(trouble(error).message, "error"))
  }
  const png = attempt(async () => {
    const picture = await pickedPicture(document)
    if (!picture) return tell(said.noPicture, "error")
    save(picture, `${NAME}.png`)
    tell(said.saved(`${NAME}.png`))
  })
  const fresh = () => {
    close()
    useStudio.getState().change(words.edits.clear, ({ size, sampling }) => ({
      ...emptyDocument(size),
      sampling,
    }))
  }
  const file = (form: Form) =>
    attempt(async () => {
      save(await written(document, form), `${NAME}.${form}`)
      tell(said.saved(`${NAME}.${form}`))
    })
  const copy = (what: string, text: string) =>
    attempt(async () => {
      try {
        await navigator.clipboard.writeText(text)
        tell(said.copied(what))
      } catch {
        // Not every page may copy; then the text is there as a file.
        save(new Blob([text], { type: "text/plain" }), `${NAME}.txt`)
        tell(said.uncopied)
      }
    })
  return (
    <div className="export">
      <input
        ref={input}
        type="file"
        accept={OPENED}
        aria-label={said.open}
        tabIndex={-1}
        hidden
        onChange={(event) => {
          const [chosen] = event.target.files ?? []
          event.target.value = ""
          if (chosen) attempt(() => openFile(chosen))()
        }}
      />
      <button type="button" className="plain" popoverTarget={MENU} aria-haspopup="true">
        {said.menu}
      </button>
      <div ref={menu} id={MENU} popover="auto" className="menu">
        <button type="button" onClick={fresh}>
          {said.fresh}
        </button>
        <button type="button" onClick={() => input.current?.click()}>
          {said.open}
        </button>
        <p className="hint">{said.save}</p>
        <button type="button" onClick={png}>
          {said.png}
        </button>
        {FORMS.map((form) => (
          <button key={form} type="button" onClick={file(form)}>
            {said[form]}
          </button>
        ))}
        <p className="hint">{said.copy}</p>
        <button type="button" onClick={copy(said.command, asCommand(document, `${NAME}.ora`))}>
          {said.command}
        </button>
        <button type="button" onClick={copy(said.python, asPython(document))}>
          {said.python}
        </button>
        <button type="button" onClick={copy(said.json, asJson(document))}>
          {said.json}
        </button>
      </div>
    </div>
  )
}
