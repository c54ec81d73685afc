"""The servers as installed: one folder of site-packages with `gateway`, `services`, `local` and the model in it.

In the tree a module's path is its import name, and those names are short: others use them too. So that nothing can
collide, a wheel puts them into this folder and nothing beside it. A process that runs one of the servers, or starts
them, calls `enter` first; in that process the names then mean what they mean in the tree. A program of another purpose
should call a server through `collage_client`, and not enter.
"""

import os
import runpy
import sys
from pathlib import Path

ROOMS = Path(__file__).parent


def enter() -> None:
    """Puts the rooms first on the path of this process and of those that it starts."""
    if str(ROOMS) not in sys.path:
        sys.path.insert(0, str(ROOMS))
        beyond = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOMS), *([beyond] if beyond else [])])


def door() -> None:
    """The process of `python -m door`."""
    _run("door")


def gateway() -> None:
    """The process of `python -m gateway`."""
    _run("gateway")


def compositor() -> None:
    """The process of `python -m services.compositor`."""
    _run("services.compositor")


def inversion() -> None:
    """The process of `python -m services.inversion`."""
    _run("services.inversion")


def generator() -> None:
    """The process of `python -m services.generator`."""
    _run("services.generator")


def _run(module: str) -> None:
    enter()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
