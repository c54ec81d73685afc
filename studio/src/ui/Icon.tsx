// Drawn for this page on a grid of 20, stroke 1.6. Decoration: what a button does is in its name.

const paths = {
  add: "M10 4v12M4 10h12",
  close: "M5 5l10 10M15 5L5 15",
  undo: "M7 4L3.5 7.5 7 11M4 7.5h7.5a4.5 4.5 0 0 1 0 9H8",
  redo: "M13 4l3.500 3.500L13 11M16 7.500H8.500a4.500 4.500 0 0 0 0 9H12",
  picture: "M3 4.500h14v11H3zM3 13l4-4 3.500 3.500 2-2L17 14M12.500 7.500h.01",
  eye: "M2 10s3-5 8-5 8 5 8 5-3 5-8 5-8-5-8-5zM10 12.200a2.200 2.200 0 1 0 0-4.400 2.200 2.200 0 0 0 0 4.400z",
  eyeOff:
    "M3 3l14 14M8 5.200C14 4 18 10 18 10s-.9 1.500-2.500 2.900M12 14.800C6 16 2 10 2 10s1-1.700 2.700-3.100",
  lock: "M5.500 9h9v7.500h-9zM7 9V6.500a3 3 0 0 1 6 0V9",
  unlock: "M5.500 9h9v7.500h-9zM7 9V6.500a3 3 0 0 1 5.700-1.300",
  copy: "M7 7h9.500v9.500H7zM4 13H3.500V3.500H13V4",
  trash: "M4 6h12M8 6V4h4v2M5.500 6l.8 10.500h7.400L14.500 6M8.500 9v5M11.500 9v5",
  flipH: "M10 3v14M7.500 6L3 14h4.500zM12.500 6L17 14h-4.500z",
  flipV: "M3 10h14M6 7.500L14 3v4.500zM6 12.500L14 17v-4.500z",
  up: "M10 16V4M5 9l5-5 5 5",
  down: "M10 4v12M5 11l5 5 5-5",
  group: "M3 3h6v6H3zM11 11h6v6h-6zM12 5h3v3M8 15H5v-3",
  ungroup: "M3 3h6v6H3zM11 11h6v6h-6z",
  zoomIn: "M9 14A5 5 0 1 0 9 4a5 5 0 0 0 0 10zM13 13l4 4M9 7v4M7 9h4",
  zoomOut: "M9 14A5 5 0 1 0 9 4a5 5 0 0 0 0 10zM13 13l4 4M7 9h4",
  fit: "M3 7V3h4M13 3h4v4M17 13v4h-4M7 17H3v-4",
  help: "M7.500 7.500a2.500 2.500 0 1 1 3.600 2.200c-.8.4-1.100.9-1.100 1.800M10 14.500h.01M10 18a8 8 0 1 0 0-16 8 8 0 0 0 0 16z",
  sun: "M10 13.500a3.500 3.500 0 1 0 0-7 3.500 3.500 0 0 0 0 7zM10 2v2M10 16v2M2 10h2M16 10h2M4.300 4.300l1.400 1.400M14.300 14.300l1.400 1.400M4.300 15.700l1.400-1.400M14.300 5.700l1.400-1.400",
  moon: "M16 12A6.500 6.500 0 0 1 8 4a6.500 6.500 0 1 0 8 8z",
  auto: "M10 17.500a7.500 7.500 0 1 0 0-15 7.500 7.500 0 0 0 0 15zM10 2.500v15M10 6h5.700M10 10h7.200M10 14h5.700",
  mask: "M3 4h14v12H3zM10 13.500a3.500 3.500 0 1 0 0-7 3.500 3.500 0 0 0 0 7z",
  warning: "M10 3l7.500 13.500h-15zM10 8.500v3.500M10 14.200h.01",
  grip: "M7.500 5h.01M12.500 5h.01M7.500 10h.01M12.500 10h.01M7.500 15h.01M12.500 15h.01",
  dice: "M4 4h12v12H4zM7.500 7.500h.01M12.500 7.500h.01M10 10h.01M7.500 12.500h.01M12.500 12.500h.01",
  chevron: "M7 5l5 5-5 5",
  more: "M5 10h.01M10 10h.01M15 10h.01",
} as const

export type IconName = keyof typeof paths

export function Icon({ name }: { name: IconName }) {
  return (
    <svg
      className="glyph"
      viewBox="0 0 20 20"
      width="20"
      height="20"
      aria-hidden="true"
      focusable="false"
    >
      <path d={paths[name]} />
    </svg>
  )
}
