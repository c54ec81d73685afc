// Everything the page says, in English. Nothing else in studio/ holds words for people.

const many = (count: number, one: string, other = `${one}s`) =>
  `${count} ${count === 1 ? one : other}`

export const words = {
  title: "Collage Studio",
  regions: {
    tools: "Tools",
    layers: "Layers",
    canvas: "Canvas",
    inspector: "Settings",
    versions: "Versions",
    status: "Status",
    art: "Art to play with",
  },
  tabs: { layers: "Layers", scene: "Scene", layer: "Layer", versions: "Versions" },
  status: {
    unsaved:
      "This browser does not let the page keep your work. Export it before you close the tab.",
    planning: "Looking …",
    opening: "Opening your collage …",
  },
  errors: {
    unreachable:
      "The server does not answer. Your work is kept here; the page asks again by itself.",
    unknown: "Something went wrong at the server.",
    undecodable: (file: string) =>
      `${file} is no picture that this browser can open. PNG, JPEG and WebP always work.`,
    notPictures: "There is no picture in what was dropped or pasted.",
    lost: (layer: string) =>
      `The picture of ${layer} is neither in this browser nor at the server. Put it in again, or delete the layer.`,
    tooMany: (limit: number) =>
      `A collage has at most ${limit} layers. Delete some, or merge pictures before.`,
  },
  intake: {
    shrunk: (file: string, width: number, height: number) =>
      `${file} was larger than the server takes and is used at ${width} × ${height}.`,
    converted: (file: string) => `${file} was converted to PNG.`,
  },
  edits: {
    add: (name: string) => `Add ${name}`,
    addMany: (count: number) => `Add ${many(count, "picture")}`,
    remove: (names: string) => `Delete ${names}`,
    duplicate: (names: string) => `Duplicate ${names}`,
    move: (names: string) => `Move ${names}`,
    scale: (names: string) => `Resize ${names}`,
    turn: (names: string) => `Turn ${names}`,
    transform: (names: string) => `Place ${names}`,
    flip: (names: string) => `Flip ${names}`,
    order: (names: string) => `Reorder ${names}`,
    hide: (names: string) => `Hide ${names}`,
    show: (names: string) => `Show ${names}`,
    lock: (names: string) => `Lock ${names}`,
    unlock: (names: string) => `Unlock ${names}`,
    group: (names: string) => `Group ${names}`,
    ungroup: (names: string) => `Ungroup ${names}`,
    rename: (name: string) => `Rename ${name}`,
    text: (name: string) => `Words of ${name}`,
    dial: (dial: string, name: string) => `${dial} of ${name}`,
    prompt: "Scene",
    negative: "What must not show",
    background: "Background",
    size: "Canvas size",
    sampling: (setting: string) => setting,
    restore: "Go back to a version",
    open: (file: string) => `Open ${file}`,
    clear: "New collage",
  },
  said: {
    did: (edit: string) => edit,
    undone: (edit: string) => `Took back: ${edit}`,
    redone: (edit: string) => `Did again: ${edit}`,
    nothingToUndo: "Nothing to undo",
    nothingToRedo: "Nothing to redo",
    selected: (names: string) => `Selected ${names}`,
    nothingSelected: "Nothing selected",
    order: (name: string, place: number, count: number) =>
      `${name}, ${place} of ${count} from the front`,
    place: (name: string, x: number, y: number) => `${name} at ${x}, ${y}`,
    isLocked: (names: string) => `${names} is locked. Unlock it to change it.`,
  },
  names: (names: readonly string[]) =>
    names.length <= 2 ? names.join(" and ") : many(names.length, "layer"),
} as const
