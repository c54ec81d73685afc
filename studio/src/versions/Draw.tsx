/** The button that draws, with how many options and what is under way. */
export function Draw() {
  return null
}
