"""What each subcommand does: one coroutine each, from parsed arguments to paths on standard output."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import (
    AsyncCollageClient,
    AsyncJob,
    CollageError,
    InvalidInput,
    JobResult,
    files,
)
from collage_client.cli import report, results
from collage_client.cli.folder import Folder
from collage_client.cli.progress import Progress

# Seconds. After an interrupt the user waits at most this long for the job to be cancelled.
_CANCEL_TIMEOUT_S = 5.0
# Command-line options and the fields of `Sampling` they set.
_SAMPLING_OPTIONS = {
    "sampler": "sampler",
    "steps": "steps",
    "guidance": "guidance_scale",
    "images": "images",
    "seed": "seed",
}


async def serve(args: argparse.Namespace) -> None:
    """Runs all services in this process until it is told to stop, or one of them has failed."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    _note("starting (the model is loaded and tried once)")
    server = await _embedded(args, args.address, log_level="INFO")
    try:
        print(f"collage service on {server.address}, data in {args.data}; Ctrl-C stops it")
        sys.stdout.flush()
        ends = [asyncio.create_task(ended.wait()), asyncio.create_task(server.failed())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        _note("stopping")
    finally:
        await server.stop()
    if not ended.is_set():
        raise CollageError(
            "a service has failed; its log is above", code=grpc.StatusCode.UNAVAILABLE
        )


async def generate(args: argparse.Namespace) -> None:
    """Draws a collage and writes a results folder."""
    collage = files.attach(files.load(args.path))
    out = Folder(args.out)
    async with _service(args) as client:
        sampling = _sampling(args)
        job = await client.generate(collage, sampling, skip_failed_words=args.skip_failed_words)
        result = await _follow(job)
        drawn = await results.plan_pictures(client, result.job.plan)
    work = pb.GenerateWork(
        collage=collage, sampling=sampling, skip_failed_words=args.skip_failed_words
    )
    written = results.write_result(out, collage, work, result, drawn)
    print(report.result(result, collage.size))
    print(report.paths(written))


async def plan(args: argparse.Namespace) -> None:
    """Resolves a collage without drawing it and writes what is known."""
    collage = files.attach(files.load(args.path))
    out = Folder(args.out)
    async with _service(args) as client:
        made = await client.plan(collage, _sampling(args))
        drawn = await results.plan_pictures(client, made)
    written = results.write_plan(out, collage, made, drawn)
    print(report.plan(made, collage.size))
    print(report.cost(made))
    print(report.paths(written))


async def redo(args: argparse.Namespace) -> None:
    """Draws layers of an earlier result again and writes a results folder."""
    if args.out.resolve() == args.folder.resolve():
        text = "must differ from the folder that is redone, which keeps the parent picture"
        raise InvalidInput.in_field("--out", text, reason="FILE")
    earlier = results.read(args.folder, args.image)
    collage, sampling = earlier.collage, earlier.sampling
    for name in args.layer:
        layer = _layer(collage, name)
        if args.noise is not None:
            layer.noise = args.noise
        # The layer's own seed would draw the same again, whatever the picture's seed.
        layer.ClearField("seed")
    sampling.ClearField("seed")
    sampling.ClearField("preview_every")
    sampling.images = 1
    if args.model:
        sampling.ClearField("model")
    sampling.MergeFrom(_sampling(args))
    out = Folder(args.out)
    work = pb.RedoWork(collage=collage, layers=args.layer, sampling=sampling)
    async with _service(args) as client:
        result = await _follow(await client.redo(collage, earlier.parent, args.layer, sampling))
        drawn = await results.plan_pictures(client, result.job.plan)
    written = results.write_result(out, collage, work, result, drawn)
    print(report.result(result, collage.size))
    print(report.paths(written))


async def sweep(args: argparse.Namespace) -> None:
    """Draws a collage once for each value of one dial of one layer, all with one seed."""
    collage = files.attach(files.load(args.path))
    layer = _layer(collage, args.layer)
    out = Folder(args.out)
    name, values = args.dial
    written: list[Path] = []
    rows: list[list[tuple[str, bytes]]] = []
    async with _service(args) as client:
        # The plan checks the request before the first picture and draws the seed that all share.
        sampling = (await client.plan(collage, _sampling(args))).sampling
        for value in values:
            setattr(layer, name, value)
            title = f"{args.layer} {name} {value:g}"
            result = await _follow(await client.generate(collage, sampling), title)
            drawn = await results.plan_pictures(client, result.job.plan)
            folder = Folder(args.out / f"{args.layer}-{name}-{value:g}")
            work = pb.GenerateWork(collage=collage, sampling=sampling)
            written += results.write_result(folder, collage, work, result, drawn)[-1:]
            rows = rows or [[("composite", drawn.composite)] for _ in result.images]
            for row, data in zip(rows, result.images, strict=True):
                row.append((title, data))
    written += results.write_sweep(out, args.layer, name, values, written, rows)
    print(report.sampling(collage.size, sampling))
    print(report.paths(written))


async def learn(args: argparse.Namespace) -> None:
    """Learns words for layers of a collage."""
    collage = files.attach(files.load(args.path))
    named = [_layer(collage, name) for name in args.layer]
    if args.vectors is not None:
        for layer in named or collage.layers:
            if named or layer.appearance.learn:
                layer.appearance.learn = True
                layer.appearance.vectors = args.vectors
    async with _service(args) as client:
        model = _sampling(args).model
        result = await _follow(await client.learn(collage, args.layer, model=model))
    print(report.table(("layer", "word"), result.words.items(), left=2))
    print("use a word with  appearance: {word: NAME}  in a layer")


async def words(args: argparse.Namespace) -> None:
    """Lists the learned words."""
    async with _service(args) as client:
        found = await client.words()
    print(report.words(found) if found else "no words yet; `collage learn` makes one")


async def get_word(args: argparse.Namespace) -> None:
    """Shows one word."""
    async with _service(args) as client:
        print(report.word(await client.word(args.name)))


async def export_word(args: argparse.Namespace) -> None:
    """Writes a word's vectors."""
    async with _service(args) as client:
        data = await client.fetch((await client.word(args.name)).vectors)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(data)
    print(report.paths([args.out]))


async def import_word(args: argparse.Namespace) -> None:
    """Takes in a word learned elsewhere."""
    data = args.file.read_bytes()
    async with _service(args) as client:
        print(report.word(await client.import_word(args.text, data, model=_sampling(args).model)))


async def delete_word(args: argparse.Namespace) -> None:
    """Forgets a word."""
    async with _service(args) as client:
        await client.delete_word(args.name)
    print(f"deleted {args.name}")


async def models(args: argparse.Namespace) -> None:
    """Lists the models served."""
    async with _service(args) as client:
        found = await client.models()
    print("\n\n".join(report.model(model) for model in found))


async def jobs(args: argparse.Namespace) -> None:
    """Lists the newest jobs."""
    async with _service(args) as client:
        found = await client.jobs(args.limit)
    print(report.jobs(found) if found else "no jobs yet")


def _sampling(args: argparse.Namespace) -> collage_pb2.Sampling:
    """The sampling named on the command line; what was not named stays unset."""
    sampling = collage_pb2.Sampling()
    if not _is_served_here(args):
        sampling.model = getattr(args, "model", "")
    for option, field in _SAMPLING_OPTIONS.items():
        value = getattr(args, option, None)
        if value is not None:
            try:
                setattr(sampling, field, value)
            except ValueError as error:
                text = f"{value} is out of range"
                raise InvalidInput.in_field(f"--{option}", text, reason="OPTION") from error
    for name, weight in getattr(args, "adapter", []):
        sampling.adapters.add(name=name, weight=weight)
    return sampling


def _is_served_here(args: argparse.Namespace) -> bool:
    """Does --model name a folder, models.yaml or hub id for an embedded server to load, rather than a served model?"""
    model = getattr(args, "model", "")
    return not args.server and bool(model) and ("/" in model or Path(model).exists())


def _layer(collage: collage_pb2.Collage, name: str) -> collage_pb2.Layer:
    for layer in collage.layers:
        if layer.name == name:
            return layer
    names = ", ".join(layer.name for layer in collage.layers)
    text = f"no layer {name!r}; this collage has {names}"
    raise InvalidInput.in_field("--layer", text, reason="LAYER_NAME")


@asynccontextmanager
async def _service(args: argparse.Namespace) -> AsyncIterator[AsyncCollageClient]:
    """A client of the named server, or of one started here for the call."""
    if args.server:
        async with AsyncCollageClient(args.server) as client:
            yield client
        return
    _note(f"starting an embedded server, data in {args.data} (--server ADDR uses a running one)")
    server = await _embedded(args, "127.0.0.1:0", log_level="ERROR")
    try:
        async with AsyncCollageClient(server.address) as client:
            yield client
    finally:
        await server.stop()


async def _embedded(args: argparse.Namespace, address: str, *, log_level: str) -> Any:
    # Only here: a machine that calls a server needs none of the services installed.
    try:
        from local import embedded
        from services.common.settings import InvalidSetting
        from services.common.telemetry import start_logging
    except ModuleNotFoundError as error:
        raise CollageError(
            f"no embedded server here, {error.name} is not installed; name a server with --server",
            code=grpc.StatusCode.UNAVAILABLE,
            reason="NOT_INSTALLED",
        ) from error
    start_logging("embedded", level=log_level)
    model = args.model if _is_served_here(args) else ""
    try:
        return await embedded.start(args.data, address=address, model=model)
    except InvalidSetting as error:
        raise InvalidInput.in_field("", str(error), reason="SETTING") from error


async def _follow(job: AsyncJob, title: str = "") -> JobResult:
    """Shows a job to its end. An interrupt cancels the job, not only the wait for it."""
    progress = Progress(sys.stderr, title)
    try:
        async for event in job:
            progress.show(event)
    except asyncio.CancelledError:
        progress.close()
        with suppress(CollageError):
            await job.cancel(timeout_s=_CANCEL_TIMEOUT_S)
            _note(f"cancelled {job.name}")
        raise
    finally:
        progress.close()
        await job.close()
    return await job.result()


def _note(text: str) -> None:
    """Something on the way: standard error, so that standard output holds results only."""
    print(text, file=sys.stderr, flush=True)
