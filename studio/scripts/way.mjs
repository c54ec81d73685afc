// A new user's whole way in a real browser, against a door that is already there: `node scripts/way.mjs '{"url": …}'`.
//
// url: the page. pictures: three files, window.png, birthday-cake.png and coffee-cup.jpg (a photo, whose ground is taken
// away).
// isCut: whether the service takes backgrounds away. isSelected: whether it selects what is pointed at. way: "pointer" or "keys". screens: a folder for a picture of each station; none where it is unset.
// Prints a line of JSON a station; ends with 1 and the reason where something is not as it should be.

import assert from "node:assert/strict"
import { readFileSync } from "node:fs"
import { createRequire } from "node:module"
import { basename, join } from "node:path"
import { chromium } from "playwright-core"

const {
  url,
  pictures,
  isCut,
  isSelected,
  way = "pointer",
  screens,
  browser: executablePath,
} = JSON.parse(process.argv[2])
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core"), "utf8")
// Drawing, on a busy machine.
const LONG_MS = 120_000

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] })
const context = await browser.newContext({
  viewport: { width: 1440, height: 900 },
  acceptDownloads: true,
  permissions: ["clipboard-read", "clipboard-write"],
})
const page = await context.newPage()
page.setDefaultTimeout(20_000)
const wrong = []
const outside = []
page.on("pageerror", (error) => wrong.push(error.stack ?? String(error)))
page.on("console", (message) => message.type() === "error" && wrong.push(message.text()))
page.on("request", (request) => {
  const address = request.url()
  if (!/^(blob|data):/.test(address) && !address.startsWith(new URL(url).origin))
    outside.push(address)
})

const button = (name, options = {}) => page.getByRole("button", { name, ...options })
const layers = () => page.getByRole("list", { name: "Layers, front first" }).getByRole("listitem")
const scene = () => page.getByRole("combobox", { name: "Scene", exact: true })
const version = (number) => page.getByRole("listitem", { name: new RegExp(`^Version ${number}:`) })

/** One place on the way: no serious violation, and a picture of it. */
async function station(name, { settle = 300 } = {}) {
  await page.waitForTimeout(settle)
  await page.evaluate(AXE)
  const { violations } = await page.evaluate(() =>
    axe.run(document, { resultTypes: ["violations"] }),
  )
  const serious = violations
    .filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, nodes }) => ({
      id,
      nodes: nodes.map(({ html, failureSummary }) => [html.slice(0, 200), failureSummary]),
    }))
  assert.deepEqual(serious, [], `${name}: ${JSON.stringify(serious, null, 1)}`)
  if (screens)
    await page.screenshot({
      path: join(screens, `${name}.png`),
    })
  console.log(JSON.stringify({ station: name }))
}

/** Presses a button: by the pointer, or by Tab until it has the focus, then Enter. */
async function press(locator) {
  await locator.waitFor()
  if (way === "pointer") return locator.click()
  await reach(locator)
  await page.keyboard.press("Enter")
}

/** Moves the focus to an element by Tab alone. */
async function reach(locator) {
  await locator.waitFor()
  for (let presses = 0; presses < 250; presses++) {
    if (await locator.evaluate((element) => element === document.activeElement)) return
    await page.keyboard.press("Tab")
  }
  assert.fail(`Tab does not reach ${locator}`)
}

async function toggle(box) {
  const was = await box.isChecked()
  if (way === "pointer") await box.click()
  else {
    await reach(box)
    await page.keyboard.press("Space")
  }
  assert.equal(await box.isChecked(), !was)
}

/** Puts the three pictures in: dropped on the canvas, or by the button whose dialog the keyboard opens. */
async function put() {
  if (way === "keys") {
    const chooser = page.waitForEvent("filechooser")
    await press(button("Add pictures"))
    return (await chooser).setFiles(pictures)
  }
  const files = pictures.map((path) => ({
    name: basename(path),
    type: path.endsWith(".jpg") ? "image/jpeg" : "image/png",
    data: readFileSync(path).toString("base64"),
  }))
  const transfer = await page.evaluateHandle((given) => {
    const transfer = new DataTransfer()
    for (const { name, type, data } of given) {
      const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0))
      transfer.items.add(new File([bytes], name, { type }))
    }
    return transfer
  }, files)
  const canvas = page.getByRole("application", { name: "Collage" })
  const { x, y, width, height } = await canvas.boundingBox()
  const at = { clientX: x + width / 2, clientY: y + height / 2, dataTransfer: transfer }
  await canvas.dispatchEvent("dragover", at)
  await canvas.dispatchEvent("drop", at)
}

/** Waits until a version has all its pictures. */
async function drawn(number) {
  await button(`Use option 1 of version ${number}`).waitFor({ timeout: LONG_MS })
  await page.getByRole("progressbar", { name: `Progress of version ${number}` }).waitFor({
    state: "detached",
    timeout: LONG_MS,
  })
}

/** Draws one layer of the version that is looked at again, and goes on from what comes of it. */
async function redo(layer, { from, option, to }) {
  await press(button(new RegExp(`^Show: Version ${from}:`)))
  await press(button(`Redo parts: Option ${option} of version ${from}`))
  for (const each of ["birthday-cake", "window", "coffee-cup"]) {
    const box = page.getByRole("checkbox", { name: each, exact: true })
    if ((await box.isChecked()) !== (each === layer)) await toggle(box)
  }
  if (layer === "birthday-cake") {
    // A little wider than the cake itself.
    const area = page.getByRole("application", { name: /^Picture with the area/ })
    await area.waitFor()
    await page.waitForFunction(() =>
      document.querySelector(".painting canvas")?.hasAttribute("data-ready"),
    )
    if (way === "pointer") {
      const { x, y, width, height } = await area.boundingBox()
      await page.mouse.move(x + width * 0.3, y + height * 0.75)
      await page.mouse.down()
      await page.mouse.move(x + width * 0.55, y + height * 0.8, { steps: 4 })
      await page.mouse.up()
    } else {
      await reach(area)
      for (const key of ["ArrowDown", "ArrowDown", "Enter", "ArrowLeft", "Enter"])
        await page.keyboard.press(key)
    }
    await station("redo")
  }
  await press(button("Draw again"))
  await drawn(to)
  await press(button(`Use this: Option 1 of version ${to}`))
}

/** Points at a pane of the window, then says of the next one that it is not meant; takes both back. */
async function select() {
  const layer = "window"
  const pixels = async () => pictureOf((await saved()).document, layer)
  const until = async (isSo, otherwise) => {
    for (let waited = 0; !isSo(await pixels()); waited += 200) {
      assert.ok(waited < LONG_MS, otherwise)
      await page.waitForTimeout(200)
    }
    return pixels()
  }
  await press(layers().filter({ hasText: layer }).getByRole("button").first())
  const { document } = await saved()
  const { size } = document
  const { x, y } = document.pieces.find((piece) => piece.layer.name === layer).layer.transform
  const canvas = page.getByRole("application", { name: "Collage" })
  // The whole canvas is in view, with room for the tools above and below.
  const room = await canvas.boundingBox()
  const scale = Math.min((room.width - 48) / size.width, (room.height - 112) / size.height)
  const click = (right) =>
    page.mouse.click(
      room.x + room.width / 2 + (x + right - size.width / 2) * scale,
      room.y + room.height / 2 + (y - size.height / 9 - size.height / 2) * scale,
    )
  const aside = size.width / 12
  const before = await pixels()
  if (way === "pointer") {
    await press(button("Select object"))
    await click(-aside)
  } else {
    await reach(canvas)
    const up = ["Shift+ArrowUp", "ArrowUp", "ArrowUp"]
    for (const key of ["o", ...up, "Shift+ArrowLeft", "Enter"]) await page.keyboard.press(key)
  }
  const whole = await until((now) => now !== before, "nothing is selected")
  if (way === "pointer") {
    await page.keyboard.down("Shift")
    await click(aside)
    await page.keyboard.up("Shift")
  } else
    for (const key of ["Shift+ArrowRight", "Shift+ArrowRight", "Shift+Enter"])
      await page.keyboard.press(key)
  await until((now) => now !== whole, "what is not meant is still there")
  await station("selected")
  await page.keyboard.press("Escape")
  assert.equal(await page.getByRole("toolbar", { name: "Select object" }).count(), 0)
  await page.keyboard.press("Control+z")
  await until((now) => now === whole, "the second answer is not undone")
  await page.keyboard.press("Control+z")
  await until((now) => now === before, "the first answer is not undone")
}

const saved = () =>
  page.evaluate(async () => {
    const db = await new Promise((done) => {
      indexedDB.open("collage-studio").onsuccess = (event) => done(event.target.result)
    })
    const all = (store) =>
      new Promise((done) => {
        db.transaction(store).objectStore(store).getAll().onsuccess = (event) =>
          done(event.target.result)
      })
    const own = sessionStorage.getItem("collage-studio-document")
    const documents = await all("documents")
    const versions = await all("versions")
    db.close()
    return {
      document: documents.find(({ id }) => id === own)?.document,
      versions: versions.sort((a, b) => a.number - b.number),
    }
  })

const told = (document) => ({
  prompt: document.prompt,
  drawn: document.drawn,
  layers: document.pieces.map(({ layer }) => [layer.name, layer.text, layer.transform]),
})

const pictureOf = (document, name) =>
  document.pieces.find(({ layer }) => layer.name === name).layer.image.source.value.sha256

async function exported(name) {
  await press(button("File"))
  const download = page.waitForEvent("download", { timeout: LONG_MS })
  await press(button(name))
  const file = await download
  return { path: await file.path(), name: file.suggestedFilename() }
}

async function copied(name) {
  await press(button("File"))
  await press(button(name, { exact: true }))
  await page.getByText(`Copied as ${name}`).first().waitFor()
  return page.evaluate(() => navigator.clipboard.readText())
}

try {
  await page.goto(url)
  await drawn(1)
  await station("first-visit")

  await press(button("File"))
  await press(button("New collage"))
  await put()
  await page.waitForFunction(() => document.querySelectorAll(".row").length === 3)
  // By hand or by keys, each to its place.
  const { width } = (await saved()).document.size
  for (const [layer, keys] of [
    ["window", ["ArrowUp", "ArrowLeft"]],
    ["birthday-cake", ["ArrowDown"]],
    ["coffee-cup", ["ArrowDown", "ArrowRight"]],
  ]) {
    await press(layers().filter({ hasText: layer }).getByRole("button").first())
    const noise = page.getByRole("slider", { name: "Noise" })
    if (way === "pointer") await noise.focus()
    else await reach(noise)
    for (const key of ["Home", "PageUp", "PageUp", "PageUp"]) await page.keyboard.press(key)
    const canvas = page.getByRole("application", { name: "Collage" })
    if (way === "pointer") await canvas.focus()
    else await reach(canvas)
    for (const key of keys)
      for (let moved = 0; moved < width / 6; moved++) await page.keyboard.press(key)
  }
  await station("dropped")

  if (isCut) {
    const pixels = async () => pictureOf((await saved()).document, "coffee-cup")
    const photo = await pixels()
    await press(button("Remove background"))
    await page.waitForFunction(() => !document.querySelector('[aria-label^="Removing"]'))
    for (let waited = 0; (await pixels()) === photo; waited += 200) {
      assert.ok(waited < LONG_MS, "the background is not taken away")
      await page.waitForTimeout(200)
    }
    await station("cut-out", { settle: 1000 })
  }

  if (isSelected) await select()

  if (way === "pointer") await page.getByRole("tab", { name: "Scene" }).click()
  else {
    // Of tabs the chosen one takes the focus; arrows go to the others.
    await reach(page.getByRole("tab", { selected: true }))
    await page.keyboard.press("ArrowLeft")
  }
  if (way === "pointer") await scene().click()
  else await reach(scene())
  await page.keyboard.press("Control+End")
  await page.keyboard.type(" on a table")
  await button("One option more").waitFor()
  await press(button("One option more").first())
  await page.getByTestId("expected").filter({ hasText: /\d s/ }).waitFor()
  await station("words")

  await press(button("Draw", { exact: true }))
  await page.getByRole("progressbar", { name: "Progress of version 2" }).waitFor()
  await page.getByRole("img", { name: /^Option 1 of version 2/ }).waitFor({ timeout: LONG_MS })
  await station("drawing", { settle: 0 })
  await drawn(2)
  await station("options")
  await press(button("Compare: Option 2 of version 2"))
  const slider = page.getByRole("slider", { name: /^How much of/ })
  if (way === "pointer") await slider.focus()
  else await reach(slider)
  for (let presses = 0; presses < 5; presses++) await page.keyboard.press("ArrowLeft")
  assert.equal(await slider.inputValue(), "45")
  await station("compare")
  await page.keyboard.press("Escape")
  await press(button("Use this: Option 2 of version 2"))
  await station("picked")

  await redo("birthday-cake", { from: 2, option: 2, to: 3 })
  await redo("window", { from: 3, option: 1, to: 4 })
  const picked = (await saved()).document.drawn
  await page.keyboard.press("Control+z")
  await page.waitForFunction(
    () =>
      document.querySelector('[aria-label="Use option 1 of version 3"]')?.ariaPressed === "true",
  )
  await station("undone")

  const before = await saved()
  assert.notDeepEqual(before.document.drawn, picked)
  assert.equal(before.versions.length, 4)
  await page.reload()
  await version(4).waitFor()
  await button("Use option 1 of version 3").waitFor()
  const after = await saved()
  assert.deepEqual(told(after.document), told(before.document))
  assert.deepEqual(
    after.versions.map(({ job, state, images, parent }) => [
      job,
      state,
      images.length,
      parent?.version,
    ]),
    before.versions.map(({ job, state, images, parent }) => [
      job,
      state,
      images.length,
      parent?.version,
    ]),
  )
  assert.ok(after.versions.every(({ state }) => state === "done"))
  // Each stands on the one it came from; all jobs are different ones.
  const [, second, third, fourth] = after.versions
  assert.equal(third.parent.version, second.id)
  assert.equal(fourth.parent.version, third.id)
  assert.equal(new Set(after.versions.map(({ job }) => job)).size, 4)
  await station("reloaded")

  const texts = {
    json: await copied("JSON"),
    python: await copied("Python"),
    command: await copied("collage command"),
  }
  const ora = await exported("OpenRaster (.ora)")
  assert.equal(ora.name, "collage.ora")
  const chooser = page.waitForEvent("filechooser")
  await press(button("File"))
  await press(button("Open a file …"))
  await (await chooser).setFiles({
    name: "collage.ora",
    mimeType: "image/openraster",
    buffer: readFileSync(ora.path),
  })
  await page.waitForFunction(() => !document.querySelector('[aria-pressed="true"].thumbnail'))
  await page.waitForFunction(() => document.querySelectorAll(".row").length === 3)
  await page.waitForTimeout(500)
  const opened = told((await saved()).document)
  assert.deepEqual(
    opened.layers.map(([name, text]) => [name, text]),
    told(after.document).layers.map(([name, text]) => [name, text]),
  )
  assert.equal(opened.prompt, after.document.prompt)
  await station("opened")

  assert.deepEqual(outside, [], "addresses outside the page's origin")
  assert.deepEqual(wrong, [], "errors in the page")
  console.log(JSON.stringify({ done: true, texts, jobs: after.versions.map(({ job }) => job) }))
} catch (error) {
  const path = join(process.env.TMPDIR ?? "/tmp", `studio-${way}-failed.png`)
  await page.screenshot({ path }).catch(() => undefined)
  console.log(JSON.stringify({ failed: String(error.stack ?? error), screen: path, wrong }))
  process.exitCode = 1
} finally {
  await browser.close()
}
