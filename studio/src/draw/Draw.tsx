import "./draw.css"
import { useEffect, useState } from "react"
import { setSampling } from "../edits"
import { useModel } from "../models"
import { usePlan } from "../plan"
import { useDocument, useStudio } from "../store"
import { Icon } from "../ui/Icon"
import { type Progress, secondsLeft, useProgress } from "../versions/progress"
import { isFinished, type Version } from "../versions/version"
import { useVersions } from "../versions/versions"
import { cancel } from "../versions/watch"
import { words } from "../words"
import { Count } from "./Count"
import { openResults } from "./looking"
import { drawOptions } from "./work"

const said = words.draw

/** The button that draws, with how many options and how long it takes before it, and what is under way below it. */
export function Draw() {
  const document = useDocument()
  const model = useModel()
  const planned = usePlan()
  const versions = useVersions((state) => state.versions)
  const under = versions.filter((version) => !isFinished(version))
  const images = document.sampling.images ?? 1
  const most = model?.maxImages || 16
  const set = (count: number) =>
    useStudio
      .getState()
      .change(
        words.edits.sampling(said.options),
        setSampling({ images: Math.min(Math.max(count, 1), most) }),
        "images",
      )
  const isWrong = planned.trouble !== undefined && !planned.trouble.passes
  const canDraw = document.pieces.length > 0 && !isWrong
  const draw = () =>
    void drawOptions(document).then((version) => openResults({ version: version.id }))
  return (
    <>
      <div className="draw-row">
        <Count count={images} most={most} set={set} />
        <button type="button" className="primary" disabled={!canDraw} onClick={draw}>
          {said.draw}
        </button>
      </div>
      <p className="hint" data-testid="expected">
        {document.pieces.length === 0 ? said.empty : isWrong ? said.wrong : expectation(planned)}
      </p>
      {under.length > 0 && (
        <ul className="under-way">
          {under.map((version) => (
            <UnderWay key={version.id} version={version} />
          ))}
        </ul>
      )}
    </>
  )
}

function expectation({ plan, trouble }: ReturnType<typeof usePlan.getState>): string {
  if (trouble) return trouble.message
  if (!plan) return said.planning
  const { estimatedSeconds, estimatedSecondsLow, estimatedSecondsHigh } = plan
  if (estimatedSeconds === 0) return said.unknown
  return said.seconds(estimatedSeconds, estimatedSecondsLow, estimatedSecondsHigh)
}

function UnderWay({ version }: { version: Version }) {
  const progress = useProgress((all) => all.get(version.id))
  const now = useNow()
  return (
    <li>
      <div className="draw-row">
        <button type="button" className="link" onClick={() => openResults({ version: version.id })}>
          {said.state(version.number)}
        </button>
        <span className="hint">{stand(version, progress)}</span>
        <button
          type="button"
          className="icon"
          aria-label={`${said.cancel}: ${said.state(version.number)}`}
          onClick={() => void cancel(version.id)}
        >
          <Icon name="close" />
        </button>
      </div>
      <progress
        aria-label={said.progress(version.number)}
        max={progress?.total || 1}
        value={progress?.total ? progress.step : undefined}
      />
      <span className="hint">{left(progress, now)}</span>
    </li>
  )
}

/** What a version is at, in words. */
export function stand(version: Version, progress: Progress | undefined): string {
  if (version.state === "failed") return version.why ?? words.errors.unknown
  if (version.state === "cancelled") return said.cancelled
  if (!version.job) return said.asking
  if (!progress) return said.stages[""] as string
  if (progress.word)
    return said.learning(progress.word.layer, progress.word.step, progress.word.total)
  if (progress.position !== undefined) return said.queued(progress.position)
  if (progress.step > 0) return said.step(progress.step, progress.total)
  return said.stages[progress.stage] ?? (said.stages[""] as string)
}

function left(progress: Progress | undefined, now: number): string {
  const seconds = progress && secondsLeft(progress, now)
  return seconds === undefined ? "" : said.left(seconds)
}

/** The time, twice a second. */
function useNow(): number {
  const [now, setNow] = useState(() => performance.now())
  useEffect(() => {
    const timer = setInterval(() => setNow(performance.now()), 500)
    return () => clearInterval(timer)
  }, [])
  return now
}
