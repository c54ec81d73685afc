// How smoothly a layer is dragged, and how soon the plan of it shows: `node scripts/frames.mjs '{"url": …}'`.
//
// url: the page. browser: the Chromium. trace: a file for its trace of the drag, where it is wanted.
// In a real browser: frames a second while one layer of a collage of twelve on 1024 × 1024 pixels is dragged, what a frame
// takes of the page's own thread (which others at work on the machine do not lengthen), and milliseconds from letting go to
// the plan on the page, on the canvas of the server's first model. One line of JSON.

import { chromium } from "playwright-core"

const LAYERS = 12
const SIDE = 1024
const DRAG_MS = 3000
const DRAGS = 7
const { url, browser: executablePath, trace } = JSON.parse(process.argv[2])

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] })
try {
  const frames = await dragTwelve()
  const plan = await planAfterDrag()
  console.log(JSON.stringify({ ...frames, ...plan }))
} finally {
  await browser.close()
}

async function open(context) {
  const page = await context.newPage()
  await page.goto(url)
  await page.locator(".row").first().waitFor()
  return page
}

async function dragTwelve() {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 } })
  // No model limits this canvas: there is none.
  await context.route("**/collage.v1.CollageService/*", (route) => route.abort())
  const page = await open(context)
  await page.locator(".stage").focus()
  await page.keyboard.press("Control+a")
  await page.keyboard.press("Delete")
  await page.getByRole("tab", { name: "Scene" }).click()
  for (const side of ["Width", "Height"]) await set(page, side, SIDE)
  const files = []
  for (let index = 0; index < LAYERS; index++) {
    const buffer = Buffer.from(await page.evaluate(cutOut, [SIDE, index]), "base64")
    files.push({ name: `disc ${index}.png`, mimeType: "image/png", buffer })
  }
  await page.getByTestId("files").setInputFiles(files)
  await page
    .locator(".row")
    .nth(LAYERS - 1)
    .waitFor()
  // Spread over the canvas, each at most of its size.
  for (let index = 0; index < LAYERS; index++) {
    await page.locator(".row-name").nth(index).click()
    await set(page, "X", 200 + (index % 4) * 200)
    await set(page, "Y", 250 + Math.floor(index / 4) * 250)
    await set(page, "Scale", 45 + 5 * (index % 5))
  }
  const stage = await page.locator(".stage").boundingBox()
  const view = { x: stage.x + stage.width / 2, y: stage.y + stage.height / 2 }
  if (trace) await browser.startTracing(page, { path: trace })
  await page.mouse.move(view.x, view.y)
  await page.mouse.down()
  const devtools = await context.newCDPSession(page)
  await devtools.send("Performance.enable", { timeDomain: "threadTicks" })
  const before = await busy(devtools)
  const { times, drawn } = await page.evaluate(drag, [view, DRAG_MS])
  const worked = (await busy(devtools)) - before
  await page.mouse.up()
  if (trace) await browser.stopTracing()
  await context.close()
  const gaps = times.slice(1).map((time, index) => time - times[index])
  gaps.sort((one, other) => one - other)
  const seconds = (times.at(-1) - times[0]) / 1000
  return {
    layers: LAYERS,
    canvas: SIDE,
    frames_per_second: round(Math.min(times.length - 1, drawn) / seconds),
    thread_ms_per_frame: round((1000 * worked) / drawn),
    worst_frame_ms: round(gaps.at(-1)),
    late_frame_ms: round(gaps[Math.floor(gaps.length * 0.95)]),
  }
}

/** Seconds of processor time that the page's thread has worked. */
async function busy(devtools) {
  const { metrics } = await devtools.send("Performance.getMetrics")
  return metrics.find(({ name }) => name === "TaskDuration").value
}

async function planAfterDrag() {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 } })
  const page = await open(context)
  await page.waitForFunction(() => document.documentElement.dataset.plan === "shown")
  const stage = await page.locator(".stage").boundingBox()
  const middle = { x: stage.x + stage.width / 2, y: stage.y + stage.height / 2 }
  const waits = []
  for (let drag = 0; drag < DRAGS; drag++) {
    await page.mouse.move(middle.x, middle.y)
    await page.mouse.down()
    await page.mouse.move(middle.x + 20 + drag, middle.y + 9, { steps: 4 })
    await page.evaluate(wait)
    await page.mouse.up()
    waits.push(await page.evaluate(() => globalThis.waited))
    await page.keyboard.press("Control+z")
    await page.waitForFunction(() => document.documentElement.dataset.plan === "shown")
  }
  await context.close()
  waits.sort((one, other) => one - other)
  return {
    plan_best_ms: round(waits[0]),
    plan_ms: round(waits[Math.floor(waits.length / 2)]),
    plan_worst_ms: round(waits.at(-1)),
  }
}

async function set(page, label, value) {
  const field = page.getByRole("spinbutton", { name: new RegExp(`^${label}`) })
  await field.fill(String(value))
  await field.press("Enter")
}

function round(value) {
  return Math.round(value * 10) / 10
}

// --- what runs in the page ---

/** A soft disc with transparent ground, as a PNG in base 64. */
async function cutOut([side, index]) {
  const canvas = document.createElement("canvas")
  canvas.width = side
  canvas.height = side
  const context = canvas.getContext("2d")
  const ground = context.createRadialGradient(side / 2, side / 2, 0, side / 2, side / 2, side / 2)
  ground.addColorStop(0, `hsl(${index * 30} 70% 60%)`)
  ground.addColorStop(0.9, `hsl(${index * 30 + 40} 70% 40%)`)
  ground.addColorStop(1, `hsl(${index * 30 + 40} 70% 40% / 0)`)
  context.fillStyle = ground
  context.fillRect(0, 0, side, side)
  return canvas.toDataURL("image/png").split(",")[1]
}

/**
 * Moves the pointer once a frame, from within: what a busy machine takes to send moves here is not the page's. Answers the
 * times of the frames, and in how many the canvas was drawn anew.
 */
function drag([from, duration]) {
  let drawn = 0
  let isDrawn = false
  const { clearRect } = CanvasRenderingContext2D.prototype
  CanvasRenderingContext2D.prototype.clearRect = function clear(...box) {
    if (this.canvas.closest?.(".stage")) isDrawn = true
    return clearRect.apply(this, box)
  }
  const stage = document.querySelector(".stage")
  const times = []
  return new Promise((done) => {
    const frame = (time) => {
      times.push(time)
      if (isDrawn) drawn++
      isDrawn = false
      const gone = time - times[0]
      if (gone >= duration) return done({ times, drawn })
      stage.dispatchEvent(
        new PointerEvent("pointermove", {
          bubbles: true,
          pointerId: 1,
          clientX: from.x + 120 * Math.sin(gone / 200),
          clientY: from.y + 90 * Math.sin(gone / 150),
        }),
      )
      requestAnimationFrame(frame)
    }
    requestAnimationFrame(frame)
  })
}

/** Waits from the next letting go to the frame after the plan of what then lies there is on the page. */
function wait() {
  globalThis.waited = new Promise((done) => {
    addEventListener(
      "pointerup",
      () => {
        const begin = performance.now()
        const look = () => {
          if (document.documentElement.dataset.plan === "shown") done(performance.now() - begin)
          else requestAnimationFrame(look)
        }
        // The edit itself comes first.
        requestAnimationFrame(look)
      },
      { once: true },
    )
  })
}
