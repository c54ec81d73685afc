"""During an upgrade old and new parts run side by side, and what both know works.

An earlier commit's services run under today's gateway and today's under its, as processes over real gRPC.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from local.layout import SERVICES, check_health
from local.processes import Process, free_port
from services.common.rpc import connect
from testing import toy
from testing.system import System, collage

ROOT = Path(__file__).parents[1]
# What runs beside today's parts. A later one takes its place when what it has in common with today's is worth less.
BEFORE = "23cdbff4d420db80ca4100a24a3c17ec2612f00b"
SAMPLING = {"steps": 2, "images": 1, "seed": 5}
LIMIT_S = 60


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The tree of that commit."""
    git = ("git", "-C", str(ROOT))
    found = subprocess.run(
        [*git, "cat-file", "-e", f"{BEFORE}^{{commit}}"], capture_output=True, check=False
    )
    if found.returncode:
        pytest.skip(f"commit {BEFORE[:7]} is not in this clone; `git fetch --unshallow` brings it")
    folder = tmp_path_factory.mktemp("before")
    packed = subprocess.run([*git, "archive", BEFORE], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return folder


def environment(tree, **told):
    """Of a process whose code is the tree's."""
    path = os.pathsep.join([str(tree), str(tree / "protos")])
    variables = {f"COLLAGE_{name.upper()}": value for name, value in told.items()}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def imported(tree):
    """Where a process of the tree has its code from."""
    code = "import gateway, services.common as common; print(*gateway.__path__, *common.__path__)"
    command = [sys.executable, "-P", "-c", code]
    told = subprocess.run(
        command, env=environment(tree), capture_output=True, text=True, check=True, timeout=60
    )
    return [Path(path) for path in told.stdout.split()]


@contextlib.asynccontextmanager
async def mixed(folder, model, *, services, gateway):
    """A system of services from one tree and a gateway from another."""
    at = {name: f"127.0.0.1:{free_port()}" for name in (*SERVICES, "gateway")}
    told = {"blobs": f"folder:{folder / 'blobs'}", "jobs": f"sqlite:{folder / 'jobs.sqlite'}"}
    told |= {"models": f"toy={model}", "threads": "1", "word_steps": "4"}
    told |= {name: at[name] for name in SERVICES}
    processes = {
        name: Process(
            name,
            # Without -P the folder that the tests run in would come first.
            (sys.executable, "-P", "-m", name if name == "gateway" else f"services.{name}"),
            log=folder / f"{name}.log",
            environment=environment(
                gateway if name == "gateway" else services, **told, address=at[name]
            ),
        )
        for name in at
    }
    try:
        await asyncio.gather(
            *(
                process.start(lambda name=name: check_health(at[name]), timeout_s=240)
                for name, process in processes.items()
            )
        )
        async with connect(at["gateway"]) as channel:
            stub = collage_service_pb2_grpc.CollageServiceStub(channel)
            yield System(channel=channel, stub=stub)
    finally:
        await asyncio.gather(*(process.terminate(grace_s=10) for process in processes.values()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def systems(before, tmp_path_factory):
    """Both mixtures, started together."""
    for tree in (before, ROOT):
        assert all(path.is_relative_to(tree) for path in imported(tree))
    folder = tmp_path_factory.mktemp("mixed")
    model = toy.mini(folder / "model")
    async with contextlib.AsyncExitStack() as stack:
        old_services, old_gateway = await asyncio.gather(
            *(
                stack.enter_async_context(
                    mixed(folder / name, model, services=services, gateway=gateway)
                )
                for name, services, gateway in (
                    ("old services", before, ROOT),
                    ("old gateway", ROOT, before),
                )
            )
        )
        yield {"old services": old_services, "old gateway": old_gateway}


@pytest.fixture(params=["old services", "old gateway"])
def system(request, systems):
    return systems[request.param]


def only(events, kind):
    (found,) = [getattr(event, kind) for event in events if event.WhichOneof("kind") == kind]
    return found


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_plan(system):
    request = pb.PlanCollageRequest(collage=collage(), sampling=SAMPLING)
    plan = (await system.stub.PlanCollage(request, timeout=LIMIT_S)).plan
    assert [layer.name for layer in plan.layers] == ["a", "b"]
    assert plan.prompt_tokens > 2 and plan.estimated_memory_bytes > 0
    assert (await system.picture(plan.composite)).shape == (48, 32, 3)


async def test_a_picture_and_a_redo_of_it(system):
    events = await system.generate(pb.GenerateImagesRequest(collage=collage(), sampling=SAMPLING))
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    image = only(events, "image")
    parent = await system.picture(image.blob)

    redo = pb.RedoWork(collage=collage(), layers=["b"], sampling={**SAMPLING, "seed": 6})
    redo.parent.blob.CopyFrom(image.blob)
    events = await system.generate(pb.GenerateImagesRequest(redo=redo))
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    again = only(events, "image")
    changed = np.any(await system.picture(again.blob) != parent, axis=2)
    assert 0 < changed.sum() == again.changed_pixels < changed.size


async def test_a_word_and_a_picture_with_it(system):
    asked = collage()
    asked.layers[0].appearance.learn = True
    work = pb.CreateJobRequest(learn=pb.LearnWork(collage=asked, layers=["a"]))
    job = (await system.stub.CreateJob(work, timeout=LIMIT_S)).job
    events = await system.watch(job.name)
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    (word,) = (await system.stub.ListWords(pb.ListWordsRequest(), timeout=LIMIT_S)).words
    assert word.text == "sushi"
    asked.layers[0].appearance.word = word.name
    events = await system.generate(pb.GenerateImagesRequest(collage=asked, sampling=SAMPLING))
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    only(events, "image")
