import { hush, useVoice } from "../voice"
import { words } from "../words"
import { Icon } from "./Icon"

/** What is said, for screen readers alone. Two regions in turn, so that the same words twice are heard twice. */
export function Live() {
  const { text, number } = useVoice((state) => state.said)
  return (
    <div className="unseen" aria-live="polite" data-testid="said">
      <p>{number % 2 ? text : ""}</p>
      <p>{number % 2 ? "" : text}</p>
    </div>
  )
}

export function Messages() {
  const messages = useVoice((state) => state.messages)
  return (
    <ul className="messages">
      {messages.map(({ id, text, kind }) => (
        <li key={id} className={`message ${kind}`}>
          <span>{text}</span>
          <button
            type="button"
            className="icon"
            aria-label={words.tools.close}
            onClick={() => hush(id)}
          >
            <Icon name="close" />
          </button>
        </li>
      ))}
    </ul>
  )
}
