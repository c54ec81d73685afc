"""An NVIDIA Triton server on this machine: `python -m local.triton REPOSITORY --port P`.

The server is the one of the wheel `nvidia-pytriton`, which `make` puts beside the environment (`make triton`). The
process writes the repository of `COLLAGE_MODELS` and becomes the server. Its Python backend starts a process for every
stage, with this process' Python and what that can import.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from services.common.settings import InvalidSetting
from services.common.telemetry import start_logging

ROOT = Path(sys.prefix) / "triton"
_HOME = ROOT / "pytriton" / "tritonserver"
# Where the backend and we keep memory that processes share: `NAME_PREFIX` and the server's own process' id.
SHARED = Path("/dev/shm")
PREFIX = "collage_triton"
PROBE_S = 5.0


class NoTriton(Exception):
    """The server's program is not on this machine."""


def is_here() -> bool:
    """Whether the server's program is on this machine."""
    return (_HOME / "bin" / "tritonserver").exists()


def command(repository: Path, *, port: int, metrics_port: int, loaded: Sequence[str]) -> list[str]:
    """The server's command line, on loopback.

    Args:
        repository: its models'.
        port: for gRPC.
        metrics_port: for Prometheus; 0 for none.
        loaded: names of the models that it loads at its start.

    Raises:
        NoTriton: naming what installs it.
    """
    if not is_here():
        raise NoTriton(f"no Triton server in {ROOT}: `make triton` puts it there")
    metrics = (
        ["--allow-metrics=true", "--metrics-address=127.0.0.1", f"--metrics-port={metrics_port}"]
        if metrics_port
        else ["--allow-metrics=false"]
    )
    return [
        str(_HOME / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={_HOME / 'backends'}",
        # Generators have a model whose process died loaded anew.
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in loaded),
        "--allow-http=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        # Names of our own in shared memory, so that what a killed server left can be told from others'.
        f"--backend-config=python,shm-region-prefix-name={PREFIX}_{os.getpid()}_",
        *metrics,
    ]


def environment() -> dict[str, str]:
    """What the server and its Python need: libraries, this Python first, and what this one can import."""
    # Of a virtual environment the shared libpython is the base interpreter's.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(ROOT / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(
            [*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        ),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each and Path(each).is_dir()),
    }


async def answers(address: str) -> None:
    """Returns when a server serves, its models loaded; raises while it does not. Whether it computes is `probe`'s."""
    import tritonclient.grpc.aio as triton

    # Over a connection of its own: one that failed before would wait before it tries again.
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with triton.InferenceServerClient(address, channel_args=options) as client:
        if not await client.is_server_ready(client_timeout=PROBE_S):
            raise ConnectionError(f"{address} does not serve yet")


def sweep(shared: Path = SHARED) -> list[str]:
    """Frees the shared memory of servers that are gone: a killed one leaves its behind. Answers what was freed."""
    freed = []
    for region in shared.glob(f"{PREFIX}_*"):
        pid = region.name.removeprefix(f"{PREFIX}_").partition("_")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                region.unlink()
                freed.append(region.name)
    return sorted(freed)


def main() -> int:
    """Becomes the server; answers an exit status where that is not possible."""
    from services.common.settings import GeneratorSettings, read
    from services.generator.folder_card import read_catalog
    from services.generator.triton import repository

    parser = argparse.ArgumentParser(prog="python -m local.triton", description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--metrics-port", type=int, default=0)
    told = parser.parse_args()
    start_logging("triton", level="INFO")
    try:
        settings = read(GeneratorSettings)
        sweep()
        cards = read_catalog(settings.models).cards
        names = repository.write(cards, told.repository, threads=settings.threads or 1)
        line = command(
            told.repository, port=told.port, metrics_port=told.metrics_port, loaded=names
        )
    except (InvalidSetting, NoTriton) as error:
        sys.stderr.write(f"triton: {error}\n")
        return 2
    return os.execve(line[0], line, environment())


if __name__ == "__main__":
    sys.exit(main())
