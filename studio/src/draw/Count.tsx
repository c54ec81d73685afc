import { words } from "../words"

const said = words.draw

/** How many options, with a button for one less and one more. */
export function Count(props: { count: number; most: number; set: (count: number) => void }) {
  const { count, most, set } = props
  return (
    <fieldset className="count">
      <legend>{said.options}</legend>
      <button
        type="button"
        aria-label={said.fewer}
        disabled={count <= 1}
        onClick={() => set(count - 1)}
      >
        −
      </button>
      <output aria-label={said.options}>{count}</output>
      <button
        type="button"
        aria-label={said.more}
        disabled={count >= most}
        onClick={() => set(count + 1)}
      >
        +
      </button>
    </fieldset>
  )
}
