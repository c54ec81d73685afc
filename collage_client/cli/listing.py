"""What looks at a server or tidies it: jobs, models and words. None of these draws."""

from __future__ import annotations

import argparse

from collage.v1 import collage_service_pb2 as pb
from collage_client import InvalidInput, _disk
from collage_client._calls import MAX_BLOB_BYTES
from collage_client.cli import report, results
from collage_client.cli.folder import Folder
from collage_client.cli.output import tree
from collage_client.cli.server import connected, served_model


async def words(args: argparse.Namespace) -> None:
    """Lists the learned words."""
    async with connected(args) as client:
        found = await client.words()
    text = report.words(found) if found else "no words yet; `collage learn` makes one"
    args.output.tell(text, {"words": [tree(word) for word in found]})


async def get_word(args: argparse.Namespace) -> None:
    """Shows one word."""
    async with connected(args) as client:
        word = await client.word(args.name)
    args.output.tell(report.word(word), tree(word))


async def export_word(args: argparse.Namespace) -> None:
    """Writes a word's vectors."""
    async with connected(args) as client:
        data = await client.fetch((await client.word(args.name)).vectors)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(data)
    args.output.tell(report.paths([args.out]), {"word": args.name, "files": [str(args.out)]})


async def import_word(args: argparse.Namespace) -> None:
    """Takes in a word learned elsewhere."""
    try:
        data = _disk.read(args.file, MAX_BLOB_BYTES)
    except _disk.Unreadable as error:
        raise InvalidInput.in_field("FILE", f"{args.file}: {error}", reason="FILE") from error
    async with connected(args) as client:
        word = await client.import_word(args.text, data, model=served_model(args))
    args.output.tell(report.word(word), tree(word))


async def delete_word(args: argparse.Namespace) -> None:
    """Forgets a word."""
    async with connected(args) as client:
        await client.delete_word(args.name)
    args.output.tell(f"deleted {args.name}", {"deleted": args.name})


async def models(args: argparse.Namespace) -> None:
    """Lists the models served."""
    async with connected(args) as client:
        found, cutting = await client.models(), await client.cut_out_models()
    text = "\n\n".join([*map(report.model, found), report.cut_out_models(cutting)])
    args.output.tell(
        text,
        {"models": [tree(model) for model in found], "cutouts": [tree(each) for each in cutting]},
    )


async def jobs(args: argparse.Namespace) -> None:
    """Lists the newest jobs."""
    async with connected(args) as client:
        found = await client.jobs(args.limit)
    text = report.jobs(found) if found else "no jobs yet"
    args.output.tell(text, {"jobs": [tree(job) for job in found]})


async def show_job(args: argparse.Namespace) -> None:
    """Shows one job as it stands."""
    async with connected(args) as client:
        job = await client.job(_name(args))
    args.output.tell(report.job(job), tree(job))


async def cancel_job(args: argparse.Namespace) -> None:
    """Stops one job."""
    async with connected(args) as client:
        job = await client.cancel(_name(args))
    args.output.tell(report.jobs([job]), tree(job))


async def watch_job(args: argparse.Namespace) -> None:
    """Follows a job to its end. An interrupt ends the watching, not the job."""
    async with connected(args) as client:
        job = client.watch(_name(args))
        with args.output.progress() as progress:
            async for event in job:
                progress.show(event)
                if args.output.is_json:
                    if event.HasField("preview"):
                        event.preview.ClearField("png")
                    args.output.line(tree(event))
        result = await job.result()
    if not args.output.is_json:
        args.output.tell(report.result(result), {})


async def fetch_job(args: argparse.Namespace) -> None:
    """Writes what a job drew into a results folder, when it has ended."""
    out = Folder(args.out)
    async with connected(args) as client:
        job = client.watch(_name(args))
        with args.output.progress() as progress:
            async for event in job:
                progress.show(event)
        result = await job.result()
        plan: pb.Plan | None = result.job.plan if result.job.HasField("plan") else None
        drawn = await results.plan_pictures(client, plan) if plan else None
    written = results.write_fetched(out, result, drawn)
    args.output.tell(f"{report.result(result)}\n{report.paths(written.files)}", written.tree)


def _name(args: argparse.Namespace) -> str:
    """The job's whole name; the list's "jobs/" may be left out."""
    name: str = args.name
    return name if name.startswith("jobs/") else f"jobs/{name}"
