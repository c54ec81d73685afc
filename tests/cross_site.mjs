// What pages of other origins get from a door in a real browser; see test_door.py. Arguments: address of the door, the
// browser's program, a stored blob's digest. Prints what happened as one line of JSON.

import { createServer } from "node:http"
import { chromium } from "playwright-core"

const [url, executablePath, digest] = process.argv.slice(2)
const door = new URL(url)
const call = `${url}/collage.v1.CollageService/ListModels`

const elsewhere = createServer((_, answer) => {
  answer.setHeader("content-type", "text/html")
  answer.end(`<!doctype html><title>elsewhere</title><a href="${url}/">studio</a>`)
})
await new Promise((done) => elsewhere.listen(0, "127.0.0.1", done))
const { port } = elsewhere.address()

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP rebound.example 127.0.0.1",
  ],
})
const saw = { pages: {} }
for (const origin of [`http://evil.example:${port}`, `http://127.0.0.1:${port}`, `http://localhost:${port}`]) {
  const page = await browser.newPage()
  const statuses = []
  page.on("response", (answer) => {
    if (new URL(answer.url()).host === door.host) statuses.push(answer.status())
  })
  await page.goto(origin)
  const got = await page.evaluate(
    async ([url, call, digest]) => {
      const blob = `${url}/blobs/${digest}`
      const json = { "content-type": "application/json" }
      const read = (address, options) =>
        fetch(address, options).then(
          (answer) => `${answer.type} ${answer.status}`,
          () => "refused",
        )
      const element = (name, source) =>
        new Promise((done) => {
          const made = document.createElement(name)
          made.onload = () => done("loaded")
          made.onerror = () => done("refused")
          made.src = source
          document.body.append(made)
        })
      return {
        call: await read(call, { method: "POST", headers: json, body: "{}" }),
        plain: await read(call, { method: "POST", body: "{}" }),
        blind: await read(call, { method: "POST", mode: "no-cors", body: "{}" }),
        put: await read(`${url}/blobs/${"0".repeat(64)}`, { method: "PUT", body: "x" }),
        get: await read(blob),
        blindGet: await read(blob, { mode: "no-cors" }),
        page: await read(`${url}/`, { mode: "no-cors" }),
        start: await read(`${url}/start`),
        beacon: navigator.sendBeacon(call, "{}"),
        image: await element("img", blob),
        script: await element("script", blob),
      }
    },
    [url, call, digest],
  )
  // A frame that is refused fires load too.
  await page.evaluate((source) => {
    const frame = document.createElement("iframe")
    const loaded = new Promise((done) => (frame.onload = done))
    frame.src = source
    document.body.append(frame)
    return loaded
  }, `${url}/`)
  got.framed = await page.frames()[1].evaluate(() => document.title).catch(() => "refused")
  got.posted = await page.evaluate((action) => {
    const form = document.createElement("form")
    Object.assign(form, { method: "post", action, enctype: "text/plain" })
    document.body.append(form)
    setTimeout(() => form.submit(), 0)
  }, call).then(() => page.waitForURL(call)).then(() => page.textContent("body"))
  // Whom the user follows a link to may stand alone.
  await page.goto(origin)
  const [visit] = await Promise.all([page.waitForResponse(`${url}/`), page.click("a")])
  got.visit = visit.status()
  got.statuses = statuses
  saw.pages[new URL(origin).hostname] = got
  await page.close()
}

const rebound = await browser.newPage()
saw.rebound = (await rebound.goto(`http://rebound.example:${door.port}/`)).status()
const own = await browser.newPage()
const complaints = []
own.on("console", (message) => message.type() === "error" && complaints.push(message.text()))
saw.own = (await own.goto(`${url}/`)).status()
await own.waitForFunction(() => document.querySelector("#root")?.childElementCount)
saw.call = await own.evaluate(
  (call) =>
    fetch(call, { method: "POST", headers: { "content-type": "application/json" }, body: "{}" }).then(
      (answer) => answer.status,
    ),
  call,
)
saw.policy = complaints.filter((text) => text.includes("Content Security Policy"))
await browser.close()
elsewhere.close()
console.log(JSON.stringify(saw))
