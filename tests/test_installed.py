"""The two distributions, built and installed where nothing of the clone is: what they hold, and that they work.

The wheels' names and sizes are looked at in every run. `make installed` goes further: it installs both into empty
environments, starts every service by itself, and has the client draw the bento example on the server's wheel.
"""

import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import collage_client

ROOT = Path(__file__).parents[1]
# Nothing of the clone, of this environment, or of who runs it.
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("PYTHON", "COLLAGE_", "VIRTUAL"))
}
START_S = 120
# What `collage serve` says when all is ready, and what a service logs.
WHOLE = re.compile(r"collage service on (\S+),")
ALONE = re.compile(r"\"address\": ?\"([^\"]+)\"|listening +address=(\S+)")


def run(*command, cwd, timeout=900, **environment):
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def build(project, out):
    """The wheel of a project."""
    program = (
        "import sys; from hatchling.builders.wheel import WheelBuilder; "
        "print(*WheelBuilder(sys.argv[1]).build(directory=sys.argv[2], versions=['standard']))"
    )
    out.mkdir(parents=True, exist_ok=True)
    return Path(
        run(sys.executable, "-c", program, project, out, cwd=project).strip().splitlines()[-1]
    )


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheels")
    return build(ROOT / "packages" / "client", out), build(ROOT, out)


def top(wheel):
    """The names that a wheel puts into site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheels_put_nothing_of_common_name_into_site_packages(wheels):
    client, server = wheels
    assert top(client) == {"collage", "collage_client"}
    assert top(server) == {"collage_diffusion"}
    # A namespace: others may have a package below the same name.
    assert "collage/__init__.py" not in names_in(client)


def test_the_clients_wheel_is_small_and_holds_the_contract(wheels):
    client, _ = wheels
    assert client.stat().st_size <= 1_000_000
    names = names_in(client)
    protos = {path.name for path in (ROOT / "protos/collage/v1").glob("*.proto")}
    assert {f"collage/v1/{name}" for name in protos} <= names
    assert {"collage/v1/py.typed", "collage_client/py.typed"} <= names


def test_the_servers_wheel_holds_the_model_and_no_cache(wheels):
    names = names_in(wheels[1])
    assert "collage_diffusion/models/mini/weights/unet/diffusion_pytorch_model.safetensors" in names
    assert {
        f"collage_diffusion/models/cutout/{name}" for name in ("u2netp.onnx", "LICENSE")
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_servers_wheel_holds_the_page(wheels):
    built = {str(path.relative_to(ROOT)) for path in (ROOT / "studio/dist").rglob("*.*")}
    assert built and {f"collage_diffusion/{path}" for path in built} <= names_in(wheels[1])


def test_both_have_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"collage-client=={collage_client.__version__}" in project["dependencies"]


def environment(folder):
    """An empty environment; its python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    return folder / "bin" / "python"


def install(python, *what, cwd):
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *what, cwd=cwd)


def told(log, pattern):
    """Waits until a log tells of a server; its address."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        text = log.read_text() if log.exists() else ""
        if found := pattern.search(text):
            return next(group for group in found.groups() if group)
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def started(command, log, cwd, **environment):
    with log.open("wb") as out:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**CLEAN, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.installed
@pytest.mark.timeout(1800)
def test_the_clients_wheel_draws_on_the_servers_wheel(wheels, tmp_path):
    client, server = wheels
    alone, whole = environment(tmp_path / "client"), environment(tmp_path / "server")
    install(alone, client, cwd=tmp_path)
    held = run(alone, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).lower()
    for foreign in (
        "minio",
        "nats",
        "torch",
        "numpy",
        "prometheus",
        "structlog",
        "collage-diffusion",
    ):
        assert foreign not in held
    # The server is not there, and the command says what to do.
    refused = subprocess.run(
        [alone.parent / "collage", "models"],
        cwd=tmp_path,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 1
    assert "install collage-diffusion[embedded]" in refused.stderr
    assert "Traceback" not in refused.stderr
    install(whole, client, f"{server}[embedded]", cwd=tmp_path)
    log = tmp_path / "serve.log"
    process = started(
        [
            whole.parent / "collage",
            "serve",
            "--address",
            "127.0.0.1:0",
            "--data",
            tmp_path / "data",
        ],
        log,
        tmp_path,
    )
    try:
        address = told(log, WHOLE)
        run(
            *(alone.parent / "collage", "generate", ROOT / "examples" / "bento"),
            *("--server", address, "--out", tmp_path / "out", "--images", "2", "--seed", "0"),
            cwd=tmp_path,
        )
    finally:
        process.terminate()
        process.wait(timeout=60)
    # The sheet is made where pillow is installed.
    for name in ("image-0.png", "image-1.png", "composite.png", "result.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.installed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("", "collage-gateway"),
        ("[door]", "collage-door"),
        ("[compositor]", "collage-compositor"),
        ("[inversion]", "collage-inversion"),
        ("[generator]", "collage-generator"),
    ],
)
def test_each_service_starts_with_its_own_extra_alone(wheels, tmp_path, extra, command):
    client, server = wheels
    python = environment(tmp_path / "venv")
    install(python, client, f"{server}{extra}", cwd=tmp_path)
    log = tmp_path / "log"
    process = started([python.parent / command], log, tmp_path, COLLAGE_ADDRESS="127.0.0.1:0")
    try:
        # A gateway serves when its services do; alone it listens and says that they do not answer.
        assert told(log, ALONE)
    finally:
        process.terminate()
        process.wait(timeout=60)
