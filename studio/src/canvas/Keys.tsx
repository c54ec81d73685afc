import { useRef } from "react"
import { Button } from "../ui/Button"
import { words } from "../words"

/** All keys, in a window of their own. */
export function Keys() {
  const window = useRef<HTMLDialogElement>(null)
  return (
    <>
      <Button icon="help" name={words.tools.keys} onClick={() => window.current?.showModal()} />
      <dialog ref={window} className="keys" aria-label={words.keys.title}>
        <header className="panel-head">
          <h2>{words.keys.title}</h2>
          <Button icon="close" name={words.tools.close} onClick={() => window.current?.close()} />
        </header>
        <div className="keys-groups">
          {words.keys.groups.map(({ title, keys }) => (
            <section key={title}>
              <h3>{title}</h3>
              <dl>
                {keys.map(([key, does]) => (
                  <div key={key}>
                    <dt>{key}</dt>
                    <dd>{does}</dd>
                  </div>
                ))}
              </dl>
            </section>
          ))}
        </div>
      </dialog>
    </>
  )
}
