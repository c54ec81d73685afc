/** What was drawn, as a tree of versions. */
export function Versions() {
  return null
}
