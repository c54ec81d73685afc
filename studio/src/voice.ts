// What the page tells: to screen readers (a live region), and to everybody (a short message that goes again).

import { create } from "zustand"

export interface Message {
  readonly id: number
  readonly text: string
  readonly kind: "note" | "error"
}

interface Voice {
  /** The last thing said; the number tells equal texts apart. */
  readonly said: { readonly text: string; readonly number: number }
  readonly messages: readonly Message[]
}

export const useVoice = create<Voice>()(() => ({ said: { text: "", number: 0 }, messages: [] }))

const NOTE_MS = 6000

/** Only for who listens: what the eye sees anyway. */
export function say(text: string): void {
  useVoice.setState(({ said }) => ({ said: { text, number: said.number + 1 } }))
}

/** For everybody. Errors stay until they are closed. */
export function tell(text: string, kind: Message["kind"] = "note"): void {
  const { messages } = useVoice.getState()
  if (messages.some((message) => message.text === text)) return
  const id = (messages.at(-1)?.id ?? 0) + 1
  useVoice.setState({ messages: [...messages, { id, text, kind }] })
  say(text)
  if (kind === "note") setTimeout(() => hush(id), NOTE_MS)
}

export function hush(id: number): void {
  useVoice.setState(({ messages }) => ({
    messages: messages.filter((message) => message.id !== id),
  }))
}
