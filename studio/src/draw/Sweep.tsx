export function Sweep() {
  return null
}
