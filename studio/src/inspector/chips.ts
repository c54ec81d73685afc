// The scene's words with their placeholders: where they are, and what is being typed.

export interface Part {
  readonly text: string
  /** "name": a layer's placeholder; "unknown": one of no layer. */
  readonly kind: "words" | "name" | "unknown"
}

/** A prompt in parts, in order: plain words, and `{name}` placeholders. */
export function parts(prompt: string, names: readonly string[]): Part[] {
  return prompt
    .split(/(\{[A-Za-z0-9_-]+\})/)
    .filter((text) => text !== "")
    .map((text) => {
      const name = /^\{(.+)\}$/.exec(text)?.[1]
      if (name === undefined) return { text, kind: "words" }
      return { text, kind: names.includes(name) ? "name" : "unknown" }
    })
}

/** A placeholder that is being typed: where it opens, and what stands between there and the caret. */
export interface Open {
  readonly start: number
  readonly typed: string
}

export function openAt(prompt: string, caret: number): Open | undefined {
  const match = /\{([A-Za-z0-9_-]*)$/.exec(prompt.slice(0, caret))
  return match ? { start: match.index, typed: match[1] ?? "" } : undefined
}

/** Names that begin with what is typed, then those that hold it. */
export function offers(names: readonly string[], typed: string): string[] {
  const wanted = typed.toLowerCase()
  const rank = (name: string) => name.toLowerCase().indexOf(wanted)
  return names
    .filter((name) => rank(name) >= 0)
    .sort((one, other) => Math.sign(rank(one)) - Math.sign(rank(other)))
}

/** The prompt with `{name}` from `start` to `end`, parted from what stands before, and where the caret then is. */
export function filled(prompt: string, start: number, end: number, name: string) {
  const before = prompt.slice(0, start)
  // What closes a placeholder already is not doubled.
  const after = prompt.slice(end).replace(/^[A-Za-z0-9_-]*\}/, "")
  const gap = before && !/[\s({]$/.test(before) ? " " : ""
  const head = `${before}${gap}{${name}}`
  return { prompt: head + after, caret: head.length }
}
