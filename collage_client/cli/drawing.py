"""What draws: one coroutine for each subcommand, from parsed arguments to a folder and what is said of it."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from pathlib import Path

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import AsyncJob, CollageError, InvalidInput, JobResult, _disk
from collage_client.cli import conversion, report, results
from collage_client.cli.folder import Folder
from collage_client.cli.server import connected, served_model

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


async def generate(args: argparse.Namespace) -> None:
    """Draws a collage and writes a results folder."""
    collage = await conversion.collage(args)
    out = Folder(args.out)
    async with connected(args, draws=True) as client:
        sampling = _sampling(args)
        job = await client.generate(
            collage,
            sampling,
            skip_failed_words=args.skip_failed_words,
            cancel_on_disconnect=not args.server,
        )
        result = await _follow(args, job)
        drawn = await results.plan_pictures(client, result.job.plan)
    work = pb.GenerateWork(
        collage=collage, sampling=sampling, skip_failed_words=args.skip_failed_words
    )
    written = results.write_result(out, collage, work, result, drawn)
    args.output.tell(
        f"{report.result(result, collage.size)}\n{report.paths(written.files)}", written.tree
    )


async def plan(args: argparse.Namespace) -> None:
    """Resolves a collage without drawing it and writes what is known."""
    collage = await conversion.collage(args)
    out = Folder(args.out)
    async with connected(args, draws=True) as client:
        made = await client.plan(collage, _sampling(args))
        drawn = await results.plan_pictures(client, made)
    written = results.write_plan(out, collage, made, drawn)
    text = f"{report.plan(made, collage.size)}\n{report.cost(made)}\n{report.paths(written.files)}"
    args.output.tell(text, written.tree)


async def cut_out(args: argparse.Namespace) -> None:
    """Cuts the object out of a photograph and writes it."""
    try:
        data = _disk.picture(args.photo)
    except _disk.Unreadable as error:
        raise InvalidInput.in_field("PHOTO", f"{args.photo}: {error}", reason="FILE") from error
    out = args.out or args.photo.with_name(f"{args.photo.stem}-cutout.png")
    async with connected(args) as client:
        ref = await client.cut_out(
            data, model=args.cutout_model, points=args.points, not_points=args.not_points
        )
        cutout = await client.fetch(ref)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(cutout)
    args.output.tell(report.paths([out]), {"photo": str(args.photo), "files": [str(out)]})


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
    if args.adapter:
        sampling.ClearField("adapters")
    sampling.MergeFrom(_sampling(args))
    out = Folder(args.out)
    work = pb.RedoWork(
        collage=collage,
        layers=args.layer,
        sampling=sampling,
        feather=args.feather,
        restore_cutout=args.restore_cutout,
        skip_failed_words=args.skip_failed_words,
    )
    async with connected(args, draws=True) as client:
        job = await client.redo(
            collage,
            earlier.parent,
            args.layer,
            sampling,
            feather=args.feather,
            restore_cutout=args.restore_cutout,
            skip_failed_words=args.skip_failed_words,
            cancel_on_disconnect=not args.server,
        )
        result = await _follow(args, job)
        drawn = await results.plan_pictures(client, result.job.plan)
    written = results.write_result(out, collage, work, result, drawn)
    args.output.tell(
        f"{report.result(result, collage.size)}\n{report.paths(written.files)}", written.tree
    )


async def sweep(args: argparse.Namespace) -> None:
    """Draws a collage once for each value of one dial of one layer, all with one seed."""
    collage = await conversion.collage(args)
    layer = _layer(collage, args.layer)
    out = Folder(args.out)
    name, values = args.dial
    parts: list[Path] = []
    rows: list[list[tuple[str, bytes]]] = []
    async with connected(args, draws=True) as client:
        # The plan checks the request before the first picture and draws the seed that all share.
        sampling = (await client.plan(collage, _sampling(args))).sampling
        for value in values:
            setattr(layer, name, value)
            title = f"{args.layer} {name} {value:g}"
            job = await client.generate(collage, sampling, cancel_on_disconnect=not args.server)
            result = await _follow(args, job, title)
            drawn = await results.plan_pictures(client, result.job.plan)
            folder = Folder(args.out / f"{args.layer}-{name}-{value:g}")
            work = pb.GenerateWork(collage=collage, sampling=sampling)
            parts.append(results.write_result(folder, collage, work, result, drawn).files[-1])
            rows = rows or [[("composite", drawn.composite)] for _ in result.images]
            for row, data in zip(rows, result.images, strict=True):
                row.append((title, data))
    written = results.write_sweep(out, args.layer, name, values, parts, rows)
    text = f"{report.sampling(collage.size, sampling)}\n{report.paths(written.files)}"
    args.output.tell(text, written.tree)


async def learn(args: argparse.Namespace) -> None:
    """Learns words for layers of a collage."""
    collage = await conversion.collage(args)
    named = [_layer(collage, name) for name in args.layer]
    if args.vectors is not None:
        for layer in named or collage.layers:
            if named or layer.appearance.learn:
                layer.appearance.learn = True
                layer.appearance.vectors = args.vectors
    async with connected(args, draws=True) as client:
        job = await client.learn(collage, args.layer, model=served_model(args))
        result = await _follow(args, job)
    text = report.table(("layer", "word"), result.words.items(), left=2)
    args.output.tell(
        f"{text}\nuse a word with  appearance: {{word: NAME}}  in a layer",
        {"job": result.job.name, "words": result.words},
    )


def _sampling(args: argparse.Namespace) -> collage_pb2.Sampling:
    """The sampling named on the command line; what was not named stays unset."""
    sampling = collage_pb2.Sampling(model=served_model(args))
    for option, field in _SAMPLING_OPTIONS.items():
        value = getattr(args, option, None)
        if value is not None:
            try:
                setattr(sampling, field, value)
            except ValueError as error:
                text = f"{value} is out of range"
                if field == "seed":
                    text += "; leave it out for a drawn one"
                raise InvalidInput.in_field(f"--{option}", text, reason="OPTION") from error
    for name, weight in getattr(args, "adapter", []):
        sampling.adapters.add(name=name, weight=weight)
    return sampling


def _layer(collage: collage_pb2.Collage, name: str) -> collage_pb2.Layer:
    for layer in collage.layers:
        if layer.name == name:
            return layer
    names = ", ".join(layer.name for layer in collage.layers)
    text = f"no layer {name!r}; this collage has {names}"
    raise InvalidInput.in_field("--layer", text, reason="LAYER_NAME")


async def _follow(args: argparse.Namespace, job: AsyncJob, title: str = "") -> JobResult:
    """Shows a job to its end. An interrupt cancels the job, not only the wait for it."""
    try:
        async with job:
            with args.output.progress(title) as progress:
                async for event in job:
                    progress.show(event)
    except asyncio.CancelledError:
        with suppress(CollageError):
            await job.cancel(timeout_s=_CANCEL_TIMEOUT_S)
            args.output.note(f"cancelled {job.name}")
        raise
    return await job.result()
