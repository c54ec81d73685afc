"""Claims jobs from the queue and runs the pipeline on them.

Main type: `Worker`. Every gateway has one, so any gateway's job is done by whichever is free, and the job of a gateway
that died is taken up again when its lease runs out. This module knows no stage.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge, Histogram

from collage.v1 import collage_service_pb2, job_pb2
from gateway.jobs import (
    AHEAD_EVERY_S,
    Claim,
    ClaimLost,
    JobMissing,
    JobRecord,
    Jobs,
    JobState,
    JobsUnavailable,
)
from gateway.outcome import Outcome
from gateway.pipeline import Pipeline
from gateway.words import Words
from services.common.blobs import BlobStoreUnavailable
from services.common.errors import Cancelled, CollageError, Internal, Overloaded, Unavailable
from services.common.rpc import told_error
from services.common.telemetry import log, request_id

# How long one look for work waits for some to come.
CLAIM_WAIT_S = 5.0
# Pause after the queue's storage did not answer.
STORAGE_PAUSE_S = 1.0
# How often a failure of it is told that lasts.
TOLD_EVERY_S = 60.0
COUNT_EVERY_S = 30.0
# How long a job that was given back because a part is down or full rests, doubled from one time to the next.
FIRST_REST_S, LONGEST_REST_S = 2.0, 60.0
SWEEP_EVERY_S = 600.0
# When a checkpoint is given up whose job is not in this queue: another queue over the same storage may have it, and
# writes it every few seconds while it learns.
ABANDONED_S = 24 * 3600.0

JOBS = Gauge("collage_jobs", "Jobs by state", ["state"])
QUEUE_AGE_S = Gauge(
    "collage_queue_age_seconds", "Since the first of the jobs that wait was created; 0: none waits"
)
QUEUE_WAIT_S = Histogram("collage_queue_wait_seconds", "From creation to the first claim")
ENDED = Counter("collage_jobs_ended_total", "Jobs this gateway brought to an end", ["state"])


class Worker:
    """Runs up to `slots` jobs at a time until it is drained."""

    def __init__(self, jobs: Jobs, pipeline: Pipeline, words: Words, *, slots: int) -> None:
        self._jobs = jobs
        self._pipeline = pipeline
        self._words = words
        self._name = f"worker-{uuid.uuid4().hex[:8]}"
        self._draining = asyncio.Event()
        # The failure of the storage that was told last, and when.
        self._told = ("", 0.0)
        self._slots = [asyncio.create_task(self._slot()) for _ in range(slots)]
        self._housework = [asyncio.create_task(work()) for work in (self._count, self._sweep)]

    async def drain(self) -> None:
        """Claims nothing more and returns when the jobs at work have ended."""
        self._draining.set()
        await asyncio.gather(*self._slots)

    async def stop(self) -> None:
        """Gives back what is still at work and returns."""
        self._draining.set()
        tasks = [*self._slots, *self._housework]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _slot(self) -> None:
        while not self._draining.is_set():
            try:
                claim = await self._next()
                if claim is not None:
                    await self._work(claim)
            except JobsUnavailable as error:
                self._tell("job storage unavailable", error)
                await asyncio.sleep(STORAGE_PAUSE_S)
            except ClaimLost as error:
                log.warning("claim lost", message=str(error))
            except Exception:
                # One job must not take a slot down with it; its lease runs out and it is tried again.
                log.exception("slot failed")
                await asyncio.sleep(STORAGE_PAUSE_S)

    def _tell(self, event: str, error: JobsUnavailable) -> None:
        """Says now and then what all slots meet, again and again, for as long as it lasts."""
        message, before_s = self._told
        if message != str(error) or time.monotonic() > before_s + TOLD_EVERY_S:
            self._told = (str(error), time.monotonic())
            log.warning(event, message=str(error))

    async def _next(self) -> Claim | None:
        """The next claim, or None when a drain begins or none came in time."""
        claiming = asyncio.create_task(self._jobs.claim(self._name, wait_s=CLAIM_WAIT_S))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((claiming, draining), return_when=asyncio.FIRST_COMPLETED)
            if claiming.done():
                return claiming.result()
            return None
        finally:
            draining.cancel()
            if not claiming.done():
                claiming.cancel()
                # A claim that was made in the very moment of the cancel is given back.
                outcome = (await asyncio.gather(claiming, return_exceptions=True))[0]
                if isinstance(outcome, Claim):
                    await self._jobs.release(outcome)

    async def _work(self, claim: Claim) -> None:
        """Brings one job to its end, or gives it back."""
        request_id.set(claim.job.request_id)
        if claim.attempt == 1:
            QUEUE_WAIT_S.observe(max(0.0, time.time() - claim.job.created_at))
        log.info("job taken up", job=claim.job.id, attempt=claim.attempt)
        outcome = Outcome()
        running = asyncio.create_task(self._run(claim, outcome))
        cancel = asyncio.create_task(self._jobs.cancelled(claim))
        keep = asyncio.create_task(self._keep(claim))
        watchers = (cancel, keep)
        try:
            await asyncio.wait((running, *watchers), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await self._end(claim, *running.result(), outcome)
                return
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            if cancel.done():
                cancel.result()
                await self._end(claim, JobState.CANCELLED, cancelled_event(), outcome)
            else:
                keep.result()
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await self._jobs.release(claim)
            raise
        except JobsUnavailable:
            # Given back if the storage answers while the lease lasts: an outage loses no claim by itself.
            with contextlib.suppress(JobsUnavailable):
                await self._jobs.release(claim, rest_s=_rest_s(claim))
            raise
        finally:
            for task in watchers:
                task.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    async def _run(
        self, claim: Claim, outcome: Outcome
    ) -> tuple[JobState | None, collage_service_pb2.JobEvent]:
        """Runs the pipeline; the state to end in, None to give the job back."""
        if claim.attempt > 1:
            async for event in self._jobs.events(claim.job.id, live=False):
                # A job draws whatever became of its log.
                with contextlib.suppress(DecodeError):
                    told = collage_service_pb2.JobEvent.FromString(event.payload)
                    outcome.add(told, event.sequence)
        if claim.job.cancel_requested:
            return JobState.CANCELLED, cancelled_event()
        standing = _Standing(lambda ahead: self._jobs.stand(claim, ahead))

        async def emit(event: collage_service_pb2.JobEvent, *, key: str | None = None) -> None:
            if event.HasField("queued"):
                standing.say(event.queued.position)
                return
            sequence = await self._jobs.append(claim, event.SerializeToString(), key=key)
            outcome.add(event, sequence)

        try:
            job = job_pb2.AcceptedJob.FromString(claim.job.body)
            done = await self._pipeline.run(job, claim.attempt, emit)
            return JobState.DONE, collage_service_pb2.JobEvent(done=done)
        except Exception as raised:
            # Work done side by side fails as a group.
            first = _first(raised)
            if isinstance(first, ClaimLost | JobsUnavailable):
                raise first from None
            error = told_error(first)
            if isinstance(error, Internal):
                log.error("job failed by a bug", job=claim.job.id, exc_info=first)
        finally:
            await standing.close()
        if isinstance(error, Unavailable | Overloaded):
            return None, failed_event(error)
        return JobState.FAILED, failed_event(error)

    async def _end(
        self,
        claim: Claim,
        state: JobState | None,
        event: collage_service_pb2.JobEvent,
        outcome: Outcome,
    ) -> None:
        if state is None:
            rest_s = _rest_s(claim)
            message = event.failed.message
            log.warning("job given back", job=claim.job.id, message=message, rest_s=rest_s)
            await self._jobs.release(claim, rest_s=rest_s)
            return
        outcome.end(event)
        await self._jobs.finish(claim, state, event.SerializeToString(), result=outcome.dump())
        ENDED.labels(state.value).inc()
        log.info("job ended", job=claim.job.id, state=state.value, attempt=claim.attempt)
        # A job that is done has used up its checkpoints.
        if state is not JobState.DONE:
            try:
                await self._words.forget_learning(claim.job.id)
            except BlobStoreUnavailable as error:
                log.warning("checkpoints left to the sweep", job=claim.job.id, message=str(error))

    async def _keep(self, claim: Claim) -> None:
        """Extends the lease for as long as it runs; ends only by raising."""
        while True:
            await asyncio.sleep(claim.lease_s / 3)
            try:
                await self._jobs.extend(claim)
            except JobsUnavailable as error:
                # The lease may outlive the outage; if it does not, the next extension says so.
                self._tell("leases not extended", error)

    async def _count(self) -> None:
        while True:
            try:
                for state, number in (await self._jobs.counts()).items():
                    JOBS.labels(state.value).set(number)
                oldest = await self._jobs.oldest_waiting()
                QUEUE_AGE_S.set(0 if oldest is None else max(0.0, time.time() - oldest))
            except Exception as error:
                # A number that is late is no reason to stop counting for good.
                log.warning("jobs not counted", message=str(error))
            await asyncio.sleep(COUNT_EVERY_S)

    async def _sweep(self) -> None:
        while True:
            try:
                await sweep(self._jobs, self._words)
            except Exception as error:
                # What is left now is found the next time.
                log.warning("checkpoints not swept", message=str(error))
            await asyncio.sleep(SWEEP_EVERY_S)


async def sweep(jobs: Jobs, words: Words) -> None:
    """Removes the checkpoints that no job will go on from."""
    for job in await words.learning_jobs():
        try:
            if (await jobs.get(job)).state.is_final:
                await words.forget_learning(job)
        except (JobMissing, ValueError):
            await words.forget_learning(job, before=time.time() - ABANDONED_S)


class _Standing:
    """Says where a job stands at a part that has it wait: the newest, `AHEAD_EVERY_S` apart.

    One that has to wait for less than that says nothing.
    """

    def __init__(self, say: Callable[[int], Awaitable[None]]) -> None:
        self._say = say
        self._said = 0
        self._newest = 0
        self._task: asyncio.Task[None] | None = None

    def say(self, ahead: int) -> None:
        """So many stand before it now."""
        self._newest = ahead
        if self._task is None and ahead != self._said:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Says nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(AHEAD_EVERY_S)
            if self._newest == self._said:
                break
            self._said = self._newest
            try:
                await self._say(self._said)
            except (ClaimLost, JobsUnavailable) as error:
                # Whoever works on the job finds out; a place is soon another.
                log.debug("place not told", message=str(error))
        self._task = None


def _rest_s(claim: Claim) -> float:
    """How long a job rests that is given back now."""
    times_before = claim.attempt - 1 - claim.job.lost
    return float(min(LONGEST_REST_S, FIRST_REST_S * 2 ** min(times_before, 16)))


def _first(error: BaseException) -> BaseException:
    """The error itself, or the first one in a group, however nested."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def failed_event(error: CollageError) -> collage_service_pb2.JobEvent:
    """The terminal event of a failed job."""
    return collage_service_pb2.JobEvent(failed=_job_error(error))


def cancelled_event() -> collage_service_pb2.JobEvent:
    """The terminal event of a cancelled job."""
    return collage_service_pb2.JobEvent(cancelled=_job_error(Cancelled("cancelled by request")))


def exhausted_event(job: JobRecord) -> bytes:
    """The terminal event of a job whose workers were lost too often, for `QueuePolicy.exhausted`."""
    error = Unavailable(
        f"given up: {job.lost} workers were lost at work on it (it was taken up {job.attempt} times)",
        reason="WORKERS_LOST",
    )
    return failed_event(error).SerializeToString()


def _job_error(error: CollageError) -> collage_service_pb2.JobError:
    return collage_service_pb2.JobError(
        code=error.code, message=error.message, details=error.details()
    )
