"""The queue's file on a bad day: damaged, cut, foreign, newer, gone, closed; and large."""

import asyncio
import os
import random
import re
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.jobs import Jobs, JobState, JobsUnavailable, JobsUnusable, QueuePolicy
from gateway.jobs import database as module
from gateway.jobs.sqlite import SqliteJobs

POLICY = QueuePolicy(exhausted=lambda job: b"")
PAGE = 4096


def new_id() -> str:
    return str(uuid.uuid4())


async def fresh(path: Path) -> SqliteJobs:
    return await SqliteJobs.open(path, POLICY)


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A queue of 20 jobs, closed."""
    jobs = await fresh(tmp_path / "jobs.sqlite")
    for _ in range(20):
        await jobs.submit(new_id(), os.urandom(3000))
    await jobs.close()
    return tmp_path / "jobs.sqlite"


def noise(data: bytes, page: int) -> bytes:
    return data[: page * PAGE] + random.Random(page).randbytes(PAGE) + data[(page + 1) * PAGE :]


@pytest.mark.parametrize(
    "how",
    [
        lambda data: data[: len(data) // 2],
        lambda data: bytes(100) + data[100:],
        lambda data: b"PK\x03\x04 no database" * 1000,
        lambda data: b"x",
        *(lambda data, page=page: noise(data, page) for page in range(0, 28, 3)),
    ],
)
async def test_a_damaged_file_is_told_at_the_start_with_what_to_do(
    path, how: Callable[[bytes], bytes]
) -> None:
    """It was a raw sqlite3.DatabaseError, or INTERNAL at the first job."""
    path.write_bytes(how(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(JobsUnusable) as told:
        await fresh(path)
    for word in (
        str(path),
        "damaged, or no database",
        "move it away",
        ".recover",
        "jobs.sqlite-wal",
    ):
        assert word in str(told.value)
    # It is left for whoever saves what can be read.
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("PRAGMA user_version = 9", "newer version of this program (schema 9; this one reads 2)"),
        ("PRAGMA user_version = 0", "database of another program"),
        ("DROP TABLE events; DROP TABLE jobs", "database of another program"),
    ],
)
async def test_a_file_of_something_else_is_told_at_the_start(path, script: str, words: str) -> None:
    database = sqlite3.connect(path)
    database.executescript(script)
    database.close()
    with pytest.raises(JobsUnusable, match=re.escape(words)):
        await fresh(path)


async def test_a_folder_in_the_files_place_is_told_at_the_start(tmp_path) -> None:
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(JobsUnavailable, match=r"jobs\.sqlite"):
        await fresh(tmp_path / "jobs.sqlite")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JobsUnavailable):
        await fresh(tmp_path / "file" / "jobs.sqlite")


async def test_an_emptied_file_is_a_new_queue_and_says_so(path) -> None:
    path.write_bytes(b"")
    with capture_logs() as logs:
        jobs = await fresh(path)
    assert (await jobs.counts())[JobState.QUEUED] == 0
    await jobs.close()
    assert "the jobs database is empty: a new queue begins" in [log["event"] for log in logs]


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def replaced(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.replace(path, path.with_name("other"))
    path.write_bytes(path.with_name("other").read_bytes())


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (Path.unlink, "deleted or replaced"),
        (lambda path: path.rename(path.with_name("other")), "deleted or replaced"),
        (replaced, "deleted or replaced"),
        (emptied, "cut short"),
    ],
)
async def test_a_file_that_goes_while_it_is_served_takes_no_job_more(
    path, how: Callable[[Path], None], what: str
) -> None:
    """A job was accepted into a file without a name, and gone after the next start."""
    jobs = await fresh(path)
    how(path)
    for change in (
        lambda: jobs.submit(new_id(), b""),
        lambda: jobs.claim("w", wait_s=0),
        jobs.ready,
    ):
        with pytest.raises(JobsUnusable, match=f"was {what} while it was served"):
            await change()
    await jobs.close()


async def test_a_file_that_is_put_back_is_served_again(path) -> None:
    jobs = await fresh(path)
    path.rename(path.with_name("other"))
    with pytest.raises(JobsUnusable):
        await jobs.submit(new_id(), b"")
    path.with_name("other").rename(path)
    await jobs.submit(new_id(), b"")
    assert (await jobs.counts())[JobState.QUEUED] == 21
    await jobs.close()


async def test_a_row_that_is_no_job_is_damage(path) -> None:
    """SQLite keeps no checksums: it hands out whatever stands in a row."""
    jobs = await fresh(path)
    (record,), _ = await jobs.list(page_size=1)
    other = sqlite3.connect(path)
    for change in ("state = 'x'", "body = 'text'", "created_at = 'x'"):
        other.execute(f"UPDATE jobs SET {change}")
        other.commit()
        for call in (lambda: jobs.get(record.id), lambda: jobs.list(page_size=5)):
            with pytest.raises(JobsUnusable, match="a row is no job"):
                await call()
    other.close()
    await jobs.close()


async def test_a_full_database_says_full_and_goes_on_when_there_is_room(path) -> None:
    jobs = await fresh(path)
    database = jobs._database
    (pages,) = await database.run(lambda: database.execute("PRAGMA page_count").fetchone())
    await database.run(lambda: database.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    with pytest.raises(module.JobsFull, match=r"no space is left for .*free some"):
        for _ in range(20):
            await jobs.submit(new_id(), os.urandom(5000))
    await jobs.counts()
    await database.run(lambda: database.execute("PRAGMA max_page_count = 100000").fetchone())
    await jobs.submit(new_id(), os.urandom(5000))
    await jobs.close()


async def large(path: Path, jobs: int) -> None:
    await (await fresh(path)).close()
    database = sqlite3.connect(path)
    database.execute(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        " INSERT INTO jobs (id, request_id, state, attempt, created_at, body, cancel_requested)"
        " SELECT 'job-' || i, i, CASE WHEN i % 100 THEN 'done' ELSE 'queued' END, 1, i,"
        " randomblob(2000), 0 FROM n",
        (jobs,),
    )
    database.execute("INSERT INTO events SELECT number, 1, 0, x'01', NULL, NULL FROM jobs")
    database.commit()
    database.close()


async def test_no_statement_reads_a_large_table_through(tmp_path) -> None:
    path = tmp_path / "jobs.sqlite"
    await large(path, 20_000)
    jobs: Jobs = await fresh(path)
    assert isinstance(jobs, SqliteJobs)
    seen: set[str] = set()
    connection = jobs._database._connection
    await jobs._database.run(lambda: connection.set_trace_callback(seen.add))
    job = await jobs.submit(new_id(), b"x")
    claim = await jobs.claim("w", wait_s=1)
    assert claim is not None
    await jobs.extend(claim)
    await jobs.stand(claim, 2)
    await jobs.append(claim, b"x", key="k")
    assert len([event async for event in jobs.events(claim.job.id, live=False)]) == 2
    await jobs.position(job.id)
    watching = asyncio.create_task(anext(aiter(jobs.watch(job.id))))
    await watching
    await jobs._places([job.id])
    await jobs.cancel(job.id, payload=b"")
    await jobs.list(page_size=20)
    await jobs.list(page_size=20, page_token="9000")
    await jobs.counts()
    await jobs.release(claim)
    claim = await jobs.claim("w", wait_s=1)
    assert claim is not None
    await jobs.finish(claim, JobState.DONE, b"", result=b"r")
    await jobs.ready()
    await jobs.close()
    # As another process reads what was written.
    database = sqlite3.connect(path)
    statements = [s for s in seen if re.match("SELECT|UPDATE|DELETE|INSERT", s)]
    assert len(statements) > 20
    for statement in statements:
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]
        for step in plan:
            is_whole = re.match(r"SCAN (jobs|events)(?! USING (COVERING )?INDEX)", step)
            # A page of the list walks the rowid, and stops.
            assert not is_whole or "ORDER BY number DESC LIMIT" in statement, (statement, plan)
    database.close()


async def test_the_look_at_the_start_is_bounded_and_still_finds(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs.sqlite"
    await large(path, 20_000)
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    monkeypatch.setattr(module, "_STEPS_PER_LOOK", 1)
    jobs = await fresh(path)
    # What reads it afterwards is not bounded.
    assert (await jobs.counts())[JobState.DONE] == 19_800
    await jobs.close()
