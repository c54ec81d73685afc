"""The server that a command leaves behind: found again, private, ended when idle or when it is another one's."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from local.residence import Occupied, Residence, Resident, look, model_key, program, seen
from testing import toy
from testing.system import cutout

COLLAGE = """
size: {width: 32, height: 48}
prompt: a {one}
layers:
  - {name: one, text: sushi, image: {path: a.png}, noise: 1}
"""
LIMIT_S = 120


def environment(**more):
    told = {"COLLAGE_IDLE_S": "60", "OMP_NUM_THREADS": "1", **more}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **told}


def collage(*words, **more):
    """The command as a process of its own: code, JSON and what it said on the way."""
    ran = subprocess.run(
        [sys.executable, "-m", "collage_client.cli", *map(str, words), "--json"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(**more),
    )
    return ran.returncode, json.loads(ran.stdout), ran.stderr


def started(*words):
    """The command as a process that is left running."""
    return subprocess.Popen(
        [sys.executable, "-m", "collage_client.cli", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        # A shell that runs these tests in the background has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def drawing(folder, *served):
    """A long drawing, once it draws."""
    words = ("generate", folder, "--out", folder / "long", "--steps", 900, *served)
    process = started(*words)
    for line in process.stderr:
        if "step" in line:
            return process
    raise AssertionError("it does not draw")


def resident(data):
    return collage("server", "status", "--data", data)[1]


def jobs(data):
    return collage("jobs", "--data", data)[1]["jobs"]


def wait_until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def called(url, method, message):
    """What a call by the door at an address answers."""
    call = urllib.request.Request(
        f"{url}/collage.v1.CollageService/{method}",
        json.dumps(message).encode(),
        {"Content-Type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(call).read())


def state(url, job):
    """A job's, as this door tells it; None while it tells none."""
    with contextlib.suppress(OSError):
        return called(url, "GetJob", {"name": job})["job"]["state"]
    return None


@pytest.fixture
def data(tmp_path):
    yield tmp_path / "data"
    collage("server", "stop", "--data", tmp_path / "data")
    assert resident(tmp_path / "data") == {"state": "none"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(cutout())
    (tmp_path / "collage.yaml").write_text(COLLAGE)
    return tmp_path


@pytest.fixture
def model(tmp_path):
    return toy.mini(tmp_path / "toy")


def test_a_command_leaves_a_server_that_the_next_one_uses(folder, data, model):
    served = ("--data", data, "--model", model)
    assert resident(data) == {"state": "none"}
    assert not data.exists(), "who only asks makes nothing"
    code, _, notes = collage("generate", folder, "--out", folder / "out", "--seed", 1, *served)
    assert code == 0, notes
    assert "starting a server" in notes
    first = resident(data)
    assert (first["kind"], first["state"], first["is_current"]) == ("background", "idle", True)
    assert first["model"] == str(model.resolve())
    # Nobody else can read it, call it or put another in its place.
    socket = Path(first["address"].removeprefix("unix:"))
    for path in (data / ".server", socket.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in ("lock", "users", "choosing", "server.json", "log"):
        assert stat.S_IMODE((data / ".server" / name).stat().st_mode) == 0o600

    code, _, notes = collage("generate", folder, "--out", folder / "out", "--seed", 2, *served)
    assert (code, "starting" in notes) == (0, False)
    # Who only reads takes the one that is there, whatever its model.
    assert [job["state"] for job in jobs(data)] == ["JOB_STATE_DONE"] * 2
    assert resident(data)["pid"] == first["pid"]

    # A Ctrl-C ends the command and its job, and not the server; so does a command's violent end.
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = drawing(folder, *served)
        assert resident(data)["state"] == "in use"
        process.send_signal(number)
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == code
        wait_until(lambda: jobs(data)[0]["state"] == "JOB_STATE_CANCELLED")
        assert resident(data)["pid"] == first["pid"]

    # Weights that have changed are another server's.
    (weights,) = (model / "unet").glob("*.safetensors")
    os.utime(weights)
    assert not resident(data)["is_current"]
    code, _, notes = collage("plan", folder, "--out", folder / "plan", *served)
    assert (code, "starting a server" in notes, "ended" in notes) == (0, True, True)
    second = resident(data)
    assert second["pid"] != first["pid"]
    assert not socket.parent.exists()

    # The server's own violent end leaves no job for the next one to draw.
    process = drawing(folder, *served)
    os.kill(second["pid"], signal.SIGKILL)
    assert process.wait(timeout=LIMIT_S) == 1
    assert resident(data) == {"state": "none"}
    code, told, _ = collage("generate", folder, "--out", folder / "out", "--seed", 3, *served)
    assert code == 0
    wait_until(lambda: all(job["state"] != "JOB_STATE_RUNNING" for job in jobs(data)))
    assert not Path(second["address"].removeprefix("unix:")).parent.exists()
    newest, abandoned = jobs(data)[:2]
    assert (newest["name"], newest["state"]) == (told["job"], "JOB_STATE_DONE")
    assert abandoned["state"] == "JOB_STATE_CANCELLED"
    assert abandoned["attempts"] <= 2


def test_an_idle_server_ends_by_itself(folder, data, model):
    words = ("plan", folder, "--out", folder / "plan", "--data", data, "--model", model)
    assert collage(*words, COLLAGE_IDLE_S="1")[0] == 0
    wait_until(lambda: resident(data) == {"state": "none"})
    assert not (data / ".server" / "server.json").exists()


def test_a_server_of_somebodys_own_is_used_and_never_ended_for_another_model(folder, data, model):
    serve = started(
        "serve", "--address", "127.0.0.1:0", "--data", data, "--model", model, "--threads", 1
    )
    try:
        serve.stdout.readline()
        own = resident(data)
        assert own["kind"] == "serve"
        words = ("plan", folder, "--out", folder / "plan", "--data", data)
        assert collage(*words, "--model", model)[0] == 0
        code, told, notes = collage(*words)
        assert code == 1
        assert own["address"] in notes and own["address"] in told["error"]["message"]
        assert resident(data)["pid"] == own["pid"] == serve.pid
    finally:
        serve.terminate()
        serve.communicate(timeout=LIMIT_S)
    assert serve.returncode == 0


def test_the_studio_joins_the_server_and_outlives_it(folder, data, model):
    process = started(
        *("studio", folder, "--no-open", "--http", "127.0.0.1:0", "--json"),
        *("--data", data, "--model", model),
    )
    try:
        told = ""
        while not told.endswith("}\n"):
            told += process.stdout.readline()
        place = json.loads(told)
        assert place["page"] == f"{place['http']}/?open=start"
        begun = json.loads(urllib.request.urlopen(f"{place['http']}/start").read())
        (layer,) = begun["collage"]["layers"]
        picture = urllib.request.urlopen(
            f"{place['http']}/blobs/{layer['image']['blob']['sha256']}"
        )
        assert picture.read() == (folder / "a.png").read_bytes()
        _, first, _ = collage("server", "status", "--data", data)
        assert first["state"] == "in use"
        work = {"collage": begun["collage"], "sampling": {"steps": 300, "seed": "1"}}
        job = called(place["http"], "CreateJob", {"generate": work})["job"]["name"]
        wait_until(lambda: state(place["http"], job) == "JOB_STATE_RUNNING")
        os.kill(first["pid"], signal.SIGKILL)
        while "the server has ended" not in process.stderr.readline():
            assert process.poll() is None
        # The same address, once another server is there.
        wait_until(lambda: resident(data).get("pid", first["pid"]) != first["pid"])
        # The same job is found again, and goes on.
        wait_until(lambda: state(place["http"], job) == "JOB_STATE_DONE")
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()


def test_without_reuse_nothing_is_left(folder, data, model):
    words = ("plan", folder, "--out", folder / "plan", "--data", data, "--model", model)
    assert collage(*words, "--no-reuse")[0] == 0
    assert resident(data) == {"state": "none"}


def test_a_model_that_is_none_is_bad_input_and_leaves_nothing(folder, data):
    (folder / "models.yaml").write_text("models: 3\n")
    words = ("plan", folder, "--out", folder / "plan", "--data", data)
    code, told, _ = collage(*words, "--model", folder / "models.yaml")
    assert code == 2
    assert "models.yaml" in told["error"]["message"]


def described(**changes):
    told = {
        "pid": 1,
        "address": "unix:/nowhere",
        "kind": "background",
        "model": "",
        "program": program(),
        "started_at": 0.0,
        "inputs": {},
    }
    return Resident(**{**told, **changes})


async def test_a_description_counts_only_while_its_server_lives(tmp_path):
    residence = Residence(tmp_path)
    async with residence.held(wait_s=0):
        residence.describe(described())
        assert residence.resident() == described()
        with pytest.raises(Occupied):
            async with residence.held(wait_s=0.1):
                pass
        kept = (residence.folder / "server.json").read_text()
    # A killed server leaves the file and not the lock.
    (residence.folder / "server.json").write_text(kept)
    assert residence.resident() is None


async def test_a_server_whose_folder_was_deleted_leaves_the_next_one_alone(tmp_path):
    async with AsyncExitStack() as later:
        async with Residence(tmp_path).held(wait_s=0):
            shutil.rmtree(tmp_path / ".server")
            new = Residence(tmp_path)
            await later.enter_async_context(new.held(wait_s=0))
            new.describe(described(pid=2))
        assert new.is_home()
        assert new.resident() == described(pid=2)
    assert new.resident() is None
    shutil.rmtree(new.folder)
    assert not new.is_home()


async def test_one_that_others_may_write_is_not_believed(tmp_path):
    residence = Residence(tmp_path)
    async with residence.held(wait_s=0):
        residence.describe(described())
        (residence.folder / "server.json").chmod(0o644)
        with pytest.raises(OSError, match="somebody else"):
            residence.resident()
    residence.folder.chmod(0o770)
    with pytest.raises(OSError, match="somebody else"):
        Residence(tmp_path)


async def test_a_server_retires_only_when_nobody_uses_or_looks_for_it(tmp_path):
    residence = Residence(tmp_path)
    async with residence.held(wait_s=0):
        residence.describe(described())
        with residence.using():
            assert residence.idle_s() == 0
            assert not residence.retire()
        async with residence.choosing():
            assert not residence.retire()
        await asyncio.sleep(0.05)
        assert 0 < residence.idle_s() < 30
        assert residence.resident() is not None
        assert residence.retire()
        assert residence.resident() is None


def test_other_code_files_models_or_variables_are_another_server(tmp_path, monkeypatch):
    file = tmp_path / "code.py"
    file.write_text("1")
    resident = described(model="m", inputs=seen([file, tmp_path]))
    assert resident.serves("m") and resident.serves(None)
    assert not resident.serves("") and not resident.serves("n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert not resident.serves("m")
    monkeypatch.undo()
    file.write_text("22")
    assert not resident.serves("m")
    file.unlink()
    assert look(file) == []
    assert not resident.serves("m")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert model_key("weights") == str((tmp_path / "weights").resolve())
    assert model_key("owner/name") == "owner/name"
