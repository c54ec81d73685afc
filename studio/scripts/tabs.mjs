// Many browsers on one server, their tabs killed and reloaded at random: `node scripts/tabs.mjs '{"url": …}'`.
//
// url: the page. tabs: how many, each of a person of its own. seconds: how long they draw. seed: of what is done to them.
// Then every tab is opened again, and all that it ever asked for is waited for. Prints a line of JSON: the versions that
// every browser holds, and what was done to its tabs.

import { chromium } from "playwright-core"

const { url, tabs, seconds, seed, browser: executablePath } = JSON.parse(process.argv[2])
const END_MS = 240_000

/** A seeded generator (mulberry32), one a tab, so that a course can be gone again. */
function generator(start) {
  let state = start
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296
  }
}

const done = { asked: 0, reloaded: 0, closed: 0, crashed: 0 }
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] })
const end = performance.now() + seconds * 1000
const pause = (ms) => new Promise((next) => setTimeout(next, ms))

async function opened(context) {
  const page = await context.newPage()
  page.setDefaultTimeout(60_000)
  // The server may be away for a while, as the network may.
  for (let tries = 0; ; tries++) {
    try {
      await page.goto(url)
      break
    } catch (error) {
      if (tries === 60) throw error
      await pause(1000)
    }
  }
  await page.getByTestId("expected").waitFor()
  return page
}

const unfinished = (page) => page.locator(".under-way > li").count()

/** One person: draws, and loses the tab in the midst of it. */
async function person(number) {
  const random = generator(seed + number)
  // Storage and connections of its own, as of another machine.
  const context = await browser.newContext({ viewport: { width: 960, height: 640 } })
  let page = await opened(context)
  while (performance.now() < end) {
    try {
      const draw = page.getByRole("button", { name: "Draw", exact: true })
      if ((await unfinished(page)) < 2) {
        await draw.click()
        done.asked += 1
      }
      // From at once, before the server has even answered, to long after.
      await pause(random() < 0.3 ? 0 : random() * 4000)
      const what = random()
      if (what < 0.3) {
        done.reloaded += 1
        await page.reload()
      } else if (what < 0.55) {
        done.closed += 1
        await page.close()
        page = await opened(context)
      } else if (what < 0.7) {
        done.crashed += 1
        const gone = page.waitForEvent("crash", { timeout: 10_000 }).catch(() => undefined)
        void page.goto("chrome://crash").catch(() => undefined)
        await gone
        await page.close()
        page = await opened(context)
      } else await pause(random() * 3000)
    } catch (error) {
      // A tab that is slow to come back on a busy machine is opened anew: that too is a tab killed.
      console.error(`tab ${number}: ${String(error).split("\n")[0]}`)
      await page.close().catch(() => undefined)
      page = await opened(context)
    }
  }
  await page.close()
  page = await opened(context)
  const versions = await finished(page)
  await context.close()
  return versions
}

/** What a browser holds, once all of it is finished. */
async function finished(page) {
  const last = performance.now() + END_MS
  for (;;) {
    const versions = await page.evaluate(async () => {
      const db = await new Promise((found) => {
        indexedDB.open("collage-studio").onsuccess = (event) => found(event.target.result)
      })
      const all = await new Promise((found) => {
        db.transaction("versions").objectStore("versions").getAll().onsuccess = (event) =>
          found(event.target.result)
      })
      db.close()
      return all.map(({ requestId, job, state, images, why }) => {
        return { requestId, job, state, images: images.length, why }
      })
    })
    const open = versions.filter(({ state }) => !["done", "failed", "cancelled"].includes(state))
    if (open.length === 0 || performance.now() > last) return versions
    await pause(500)
  }
}

try {
  const versions = await Promise.all(Array.from({ length: tabs }, (_, number) => person(number)))
  console.log(JSON.stringify({ versions: versions.flat(), done }))
} finally {
  await browser.close()
}
