import type { ButtonHTMLAttributes, Ref } from "react"
import { Icon, type IconName } from "./Icon"

interface Props extends ButtonHTMLAttributes<HTMLButtonElement> {
  icon: IconName
  name: string
  /** Shows the name beside the icon. */
  isWide?: boolean
  ref?: Ref<HTMLButtonElement>
}

/** A button with an icon; its name is what it does, and shows when the pointer rests on it. */
export function Button({ icon, name, isWide, className, ...rest }: Props) {
  return (
    <button
      type="button"
      className={`${isWide ? "wide" : "icon"} ${className ?? ""}`.trim()}
      title={isWide ? undefined : name}
      aria-label={isWide ? undefined : name}
      {...rest}
    >
      <Icon name={icon} />
      {isWide && <span>{name}</span>}
    </button>
  )
}
