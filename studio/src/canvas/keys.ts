// Which key was pressed, whatever the layout of the keyboard.

/** The parts of a keyboard event that say which key it is. */
export type KeyPress = Pick<KeyboardEvent, "key" | "code">

/**
 * A name for the key: the letter it types where that is Latin, else the one at its place ("z" on a Cyrillic keyboard); digits
 * and signs by what they type or by the number pad; other keys as the browser names them.
 */
export function keyOf({ key, code }: KeyPress): string {
  if (/^[a-z]$/i.test(key)) return key.toLowerCase()
  if (["+", "=", "Add"].includes(key) || code === "NumpadAdd") return "+"
  if (["-", "_", "Subtract"].includes(key) || code === "NumpadSubtract") return "-"
  if (/^[0-9]$/.test(key)) return key
  if (/^(Digit|Numpad)[0-9]$/.test(code)) return code.at(-1) as string
  if (key === "[" || key === "]") return key
  if (/^Key[A-Z]$/.test(code)) return code.slice(3).toLowerCase()
  if (code === "BracketLeft") return "["
  if (code === "BracketRight") return "]"
  return key
}

/** Whether a key press belongs to what is being typed. */
export function isTyping(target: EventTarget | null): boolean {
  if (!(target instanceof HTMLElement)) return false
  if (target.isContentEditable || target.tagName === "TEXTAREA" || target.tagName === "SELECT")
    return true
  return (
    target instanceof HTMLInputElement && !["checkbox", "radio", "button"].includes(target.type)
  )
}
