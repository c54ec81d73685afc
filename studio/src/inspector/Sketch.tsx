// Small drawings of what each dial does, at its value. Decoration: the sentence beside says it.

import type { ReactNode } from "react"

function Sketch({ children }: { children: ReactNode }) {
  return (
    <svg className="sketch" viewBox="0 0 48 40" aria-hidden="true" focusable="false">
      {children}
    </svg>
  )
}

/** A closed wavy line around a point; how much it strays from a circle is `stray`. */
function blob(x: number, y: number, radius: number, stray: number): string {
  const points = Array.from({ length: 24 }, (_, i) => {
    const angle = (i / 24) * 2 * Math.PI
    const r = radius * (1 + stray * 0.28 * Math.sin(3 * angle + 1) * Math.cos(2 * angle))
    return `${(x + r * Math.cos(angle)).toFixed(1)} ${(y + r * Math.sin(angle)).toFixed(1)}`
  })
  return `M${points.join("L")}Z`
}

/** The cut-out's outline, and what is drawn in its place. */
export const noiseSketch = (value: number) => (
  <Sketch>
    <path className="drawn" d={blob(24 + value * 2, 20, 12, value * 3)} />
    <circle className="dashed" cx="24" cy="20" r="12" />
  </Sketch>
)

/** Words that pull towards the layer's place. */
export const attractSketch = (value: number) => (
  <Sketch>
    <rect className="frame" x="2" y="3" width="44" height="34" rx="2" />
    <circle className="fill" cx="30" cy="21" r="11" opacity={0.15 + 0.85 * value} />
    <path className="line" d="M6 10h12M6 10l13 8" strokeWidth={0.6 + 2.4 * value} />
  </Sketch>
)

/** Words that are kept from everywhere else. */
export const repelSketch = (value: number) => (
  <Sketch>
    <path
      className="fill"
      fillRule="evenodd"
      opacity={0.65 * (1 - value)}
      d="M2 3h44v34H2zM30 10a11 11 0 1 0 .01 0z"
    />
    <rect className="frame" x="2" y="3" width="44" height="34" rx="2" />
    <circle className="fill" cx="30" cy="21" r="11" />
  </Sketch>
)

export const opacitySketch = (value: number) => (
  <Sketch>
    <path className="frame" d="M4 6h12v14H4zM16 20h12v14H16zM28 6h12v14H28z" />
    <circle className="fill" cx="24" cy="20" r="13" opacity={value} />
  </Sketch>
)

/** Lines that hold the drawing to the cut-out's own. */
export const structureSketch = (value: number) => (
  <Sketch>
    <path className="drawn" d="M8 34V18l16-12 16 12v16z" opacity={0.25} />
    <path
      className="line"
      d="M8 34V18l16-12 16 12v16zM20 34V24h8v10"
      strokeWidth={0.5 + 2.2 * value}
    />
  </Sketch>
)

/** A look that becomes a word. */
export const appearanceSketch = (value: number) => (
  <Sketch>
    <circle className="fill" cx="13" cy="20" r="9" opacity={0.2 + 0.4 * value} />
    <path className="line" d="M26 20h7M30 17l3 3-3 3" strokeWidth="1.5" />
    <rect className="frame" x="36" y="13" width="10" height="14" rx="2" />
  </Sketch>
)
