"""The page in a real browser: a new user's whole way, by the pointer and by the keyboard alone.

`STUDIO_SCREENS=docs/studio` writes a picture of each station there, drawn by the bundled model.
`COLLAGE_TEST_CHROMIUM=required` fails where there is no Chromium, in place of skipping.
"""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from google.protobuf import json_format
from PIL import Image, ImageDraw, ImageFilter

from benchmarks import tabs
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from collage_client.cli import arguments
from door.server import serving
from local import edge, embedded
from local.processes import Process, free_port, program
from services.common.rpc import connect
from testing import networks, toy

ROOT = Path(__file__).parents[1]
STUDIO = ROOT / "studio"
ART = ROOT / "examples" / "art"
# Taken out, since every process of ours refuses settings that it does not know.
REQUIRED = os.environ.pop("COLLAGE_TEST_CHROMIUM", "") == "required"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENS = os.environ.get("STUDIO_SCREENS", "")
# Longer than any way takes on the busiest machine; the test's own limit comes after it.
WAY_S = 240

missing = [
    what
    for what, there in {
        "Chromium": CHROMIUM,
        "node": shutil.which("node"),
        "studio/node_modules (make studio)": (STUDIO / "node_modules" / "playwright-core").is_dir(),
    }.items()
    if not there
]
needs_browser = pytest.mark.skipif(
    bool(missing) and not REQUIRED,
    reason=f"there is no {', no '.join(missing)} here",
)


@contextlib.asynccontextmanager
async def embedded_door(folder: Path):
    """A whole system with the door before it; its page's address and its gateway's."""
    model = ""
    if not SCREENS:
        toys = [{"name": "toy", "source": str(toy.mini(folder / "toy"))}]
        model = networks.models_file(folder, {}, toys, {"sam": networks.pointing(folder)})
    server = await embedded.start(folder / "data", model=model, threads=1)
    try:
        async with serving("127.0.0.1:0", gateway=server.address) as url:
            yield url, server.address
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def envoy_door(folder: Path):
    """The same behind Envoy, as production has it."""
    address = f"127.0.0.1:{free_port()}"
    async with embedded_door(folder) as (url, gateway):
        arguments = edge.configure(
            folder / "envoy.json", address=address, gateways=[gateway], door=urlsplit(url).netloc
        )
        process = Process("envoy", (program("envoy"), *arguments), log=folder / "envoy.log")
        await process.start(lambda: asyncio.to_thread(edge.check, address))
        try:
            yield f"http://{address}", gateway
        finally:
            await process.terminate(grace_s=5)


DOORS = {"embedded": embedded_door, "envoy": envoy_door}


def pictures(folder: Path) -> list[str]:
    """A cake with alpha, a window with alpha, and a photo of a cup on a wooden ground."""
    side = 256
    cake = Image.open(ART / "birthday-cake-fluent.png").convert("RGBA").resize((side, side))
    cake.save(folder / "birthday-cake.png")
    window = Image.new("RGBA", (side, side))
    frame = ImageDraw.Draw(window)
    frame.rounded_rectangle((28, 12, 228, 244), 8, fill=(122, 84, 52, 255))
    for left in (42, 134):
        for top in (26, 134):
            frame.rectangle((left, top, left + 80, top + 96), fill=(168, 206, 238, 255))
            frame.ellipse((left + 8, top + 60, left + 72, top + 124), fill=(104, 158, 92, 255))
            frame.rectangle((left, top + 97, left + 80, top + 107), fill=(122, 84, 52, 255))
    frame.rectangle((20, 236, 236, 252), fill=(146, 104, 66, 255))
    window.save(folder / "window.png")
    ground = Image.effect_noise((side, side), 40).filter(ImageFilter.GaussianBlur(3))
    photo = Image.merge("RGB", [ground.point(lambda v, s=s: int(v * s)) for s in (1.3, 1.0, 0.7)])
    cup = Image.open(ART / "hot-beverage-noto.png").convert("RGBA").resize((200, 200))
    photo.paste(cup, (28, 34), cup)
    photo.save(folder / "coffee-cup.jpg", quality=92)
    return [str(folder / name) for name in ("window.png", "birthday-cake.png", "coffee-cup.jpg")]


def shrink(screen: Path) -> None:
    """A picture of a page in 256 colours, a few times smaller."""
    with Image.open(screen) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(
            screen, optimize=True
        )


async def said_by(script: str, asked: str) -> str:
    """What a script of studio/scripts/ prints; it fails where that does."""
    # Chromium makes a socket in it, whose path may not be long: a test's own folder is.
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *("node", f"scripts/{script}", asked),
            cwd=STUDIO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": folder},
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), WAY_S)
        except TimeoutError:
            process.kill()
            raise
    text = output.decode()
    assert process.returncode == 0, text
    return text


async def gone(way: str, url: str, folder: Path) -> dict:
    """What the last station of a way tells."""
    screens = str(ROOT / SCREENS) if SCREENS and way == "pointer" else None
    asked = {
        "url": url,
        "pictures": pictures(folder),
        "isCut": "service.cutOut" in (STUDIO / "src" / "mask" / "cutout.ts").read_text(),
        "isSelected": not SCREENS,
        "way": way,
        "screens": screens,
        "browser": CHROMIUM,
    }
    text = await said_by("way.mjs", json.dumps(asked))
    if screens:
        for screen in (ROOT / SCREENS).glob("*.png"):
            shrink(screen)
    told = json.loads(text.splitlines()[-1])
    assert told["done"], text
    return told


@needs_browser
@pytest.mark.parametrize("door", DOORS)
async def test_the_whole_way_by_the_pointer(door, tmp_path):
    """Pictures in, words, two options, parts again, undo, a reload, files out and in; nothing serious for axe."""
    async with DOORS[door](tmp_path) as (url, gateway):
        told = await gone("pointer", url, tmp_path)
        async with connect(gateway) as channel:
            stub = collage_service_pb2_grpc.CollageServiceStub(channel)
            request = json_format.Parse(told["texts"]["json"], pb.PlanCollageRequest())
            plan = (await stub.PlanCollage(request)).plan
            assert [layer.name for layer in plan.layers] == [
                layer.name for layer in request.collage.layers
            ]
            # The page's versions are the server's jobs: none twice, none beside them.
            jobs = (await stub.ListJobs(pb.ListJobsRequest(page_size=100))).jobs
            assert sorted(job.name for job in jobs) == sorted(told["jobs"])
    compile(told["texts"]["python"], "copied.py", "exec")
    program, verb, *options = shlex.split(told["texts"]["command"])
    assert (program, verb) == ("collage", "generate")
    parsed = arguments.parser().parse_args([verb, *options])
    assert (parsed.path.name, parsed.images) == ("collage.ora", 2)


@needs_browser
async def test_the_whole_way_by_the_keyboard_alone(tmp_path):
    async with embedded_door(tmp_path) as (url, _):
        await gone("keys", url, tmp_path)


@needs_browser
async def test_tabs_that_are_killed_lose_no_job_and_none_is_drawn_twice(tmp_path):
    """A short course of `benchmarks.tabs`, which has its bars at full length."""
    async with embedded_door(tmp_path) as (url, gateway):
        asked = {"url": url, "tabs": 3, "seconds": 12, "seed": 1, "browser": CHROMIUM}
        process = await asyncio.create_subprocess_exec(
            *("node", "scripts/tabs.mjs", json.dumps(asked)), cwd=STUDIO, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), WAY_S)
        told = json.loads(output)
        jobs = await tabs.logs(gateway)
    lost = told["done"]["reloaded"] + told["done"]["closed"] + told["done"]["crashed"]
    assert lost >= 3 and len(jobs) >= 6
    assert tabs.faults(told["versions"], jobs) == {}


@needs_browser
async def test_a_drag_of_twelve_layers_is_smooth_and_its_plan_soon_there(tmp_path):
    """50 frames a second and 300 ms, by what the page itself takes: on a busy machine both are longer to look at."""
    async with embedded_door(tmp_path) as (url, _):
        asked = json.dumps({"url": url, "browser": CHROMIUM})
        told = json.loads(await said_by("frames.mjs", asked))
    assert told["layers"] == 12
    assert told["thread_ms_per_frame"] < 1000 / 50
    assert told["plan_best_ms"] <= 300


@needs_browser
async def test_a_server_that_is_killed_and_comes_back_finds_its_jobs_wanted(tmp_path):
    server, ports = await asyncio.to_thread(tabs.serve, tmp_path)
    try:
        address, url = (f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}/")
        asked = {"url": url, "tabs": 2, "seconds": 10, "seed": 2, "browser": CHROMIUM}
        process = await asyncio.create_subprocess_exec(
            *("node", "scripts/tabs.mjs", json.dumps(asked)), cwd=STUDIO, stdout=subprocess.PIPE
        )
        async with connect(address) as channel:
            stub = collage_service_pb2_grpc.CollageServiceStub(channel)
            while len((await stub.ListJobs(pb.ListJobsRequest())).jobs) < 3:  # noqa: ASYNC110 no event tells it
                await asyncio.sleep(0.1)
        server.kill()
        await asyncio.to_thread(server.wait)
        server, _ = await asyncio.to_thread(tabs.serve, tmp_path, ports)
        output, _ = await asyncio.wait_for(process.communicate(), WAY_S)
        jobs = await tabs.logs(address)
    finally:
        server.kill()
    faults = tabs.faults(json.loads(output)["versions"], jobs)
    # What was at work when the server was killed is begun again.
    faults.pop("jobs drawn twice", None)
    assert len(jobs) >= 3 and faults == {}
