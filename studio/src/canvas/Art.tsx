import { type RefObject, useEffect, useRef } from "react"
import { type Art, art, fetchArt } from "../art"
import { addFiles } from "../intake"
import { useModel } from "../models"
import { Icon } from "../ui/Icon"
import { words } from "../words"

const TYPE = "application/x-collage-art"

/** The art that is dragged, where it is that. */
export function draggedArt(data: DataTransfer | null): Art | undefined {
  const url = data?.getData(TYPE)
  return art.find((piece) => piece.url === url)
}

/** The art that comes with the page, to press or to drag. */
export function ArtShelf({
  close,
  opener,
}: {
  close(): void
  opener: RefObject<HTMLElement | null>
}) {
  const shelf = useRef<HTMLDivElement>(null)
  const limit = useModel()?.maxLayers || undefined
  useEffect(() => {
    shelf.current?.querySelector<HTMLElement>(".pieces button")?.focus()
    const outside = (event: PointerEvent) => {
      const target = event.target as Node
      if (!shelf.current?.contains(target) && !opener.current?.contains(target)) close()
    }
    window.addEventListener("pointerdown", outside)
    return () => window.removeEventListener("pointerdown", outside)
  }, [close, opener])
  const leave = () => {
    close()
    opener.current?.focus()
  }
  return (
    <div
      ref={shelf}
      className="shelf"
      role="dialog"
      aria-label={words.art.title}
      onKeyDown={(event) => {
        if (event.key !== "Escape") return
        // The selection keeps its own.
        event.stopPropagation()
        leave()
      }}
    >
      <header>
        <h2>{words.art.title}</h2>
        <button type="button" className="icon" aria-label={words.tools.close} onClick={leave}>
          <Icon name="close" />
        </button>
      </header>
      <p className="note">{words.art.help}</p>
      <div className="pieces">
        {art.map((piece) => (
          <button
            key={piece.url}
            type="button"
            title={piece.name}
            aria-label={words.art.add(piece.name, piece.set)}
            draggable
            onDragStart={(event) => event.dataTransfer.setData(TYPE, piece.url)}
            onClick={() => void fetchArt(piece).then((file) => addFiles([file], { limit }))}
          >
            <img src={piece.url} alt="" loading="lazy" draggable={false} />
          </button>
        ))}
      </div>
    </div>
  )
}
