import react from "@vitejs/plugin-react"
import { defineConfig } from "vitest/config"

export default defineConfig({
  // Addresses in the bundle are relative: the page may lie below any path of the door.
  base: "./",
  plugins: [react()],
  build: {
    target: "es2022",
    // No data: addresses, so that the page's Content-Security-Policy can stay strict.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    license: { fileName: "licenses.md" },
  },
  test: { environment: "node", include: ["src/**/*.test.ts"] },
})
