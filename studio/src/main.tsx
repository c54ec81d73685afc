import { StrictMode } from "react"
import { createRoot } from "react-dom/client"
import { App } from "./App"
import { start } from "./start"
import { begin } from "./versions/begin"
import "./style/tokens.css"
import "./style/page.css"
import "./style/editor.css"

createRoot(document.getElementById("root") as HTMLElement).render(
  <StrictMode>
    <App />
  </StrictMode>,
)
void start().then(begin)
