/** Settings of the scene and of the selected layer. */
export function Inspector() {
  return null
}
