"""Results folders: what a finished job leaves on disk, and what `redo` reads back.

A folder holds `image-0.png` ..., `composite.png`, `masks/NAME.png`, `sheet.png`, a self-contained `collage.yaml`
and `result.json` (job, model, seeds, every resolved dial, warnings, timings, request), which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import AsyncCollageClient, JobResult, _disk, files
from collage_client._client import Work
from collage_client._errors import InvalidInput
from collage_client.cli.folder import Folder
from collage_client.cli.output import tree

RESULT_NAME = "result.json"
PLAN_NAME = "plan.json"
SWEEP_NAME = "sweep.json"
# It holds a request's texts and every layer's dials.
_MAX_RESULT_BYTES = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPictures:
    """What a plan refers to, fetched: the composite and each layer's visible mask, PNG bytes."""

    composite: bytes
    masks: dict[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What a redo needs of a results folder: the collage with its pictures, its sampling, a parent."""

    collage: collage_pb2.Collage
    sampling: collage_pb2.Sampling
    parent: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: the files (`masks` stands for its own), and what the folder's JSON file says with them."""

    files: tuple[Path, ...]
    tree: dict[str, Any]

    @classmethod
    def of(cls, folder: Folder, name: str, tree: dict[str, Any], files: Sequence[Path]) -> Written:
        """Writes the JSON file, which is last."""
        target = folder.write(name, f"{json.dumps(tree, indent=2, ensure_ascii=False)}\n".encode())
        all_files = (*files, target)
        told = {**tree, "folder": str(folder.path), "files": [str(path) for path in all_files]}
        return cls(files=all_files, tree=told)


async def plan_pictures(client: AsyncCollageClient, plan: pb.Plan) -> PlanPictures:
    """Fetches composite and masks of a plan."""
    return PlanPictures(
        composite=await client.fetch(plan.composite),
        masks={layer.name: await client.fetch(layer.mask) for layer in plan.layers},
    )


def write_plan(
    folder: Folder, collage: collage_pb2.Collage, plan: pb.Plan, drawn: PlanPictures
) -> Written:
    """Writes a plan: composite, masks, sheet, collage file, `plan.json`."""
    folder.clear()
    shown = [("composite", drawn.composite), *drawn.masks.items()]
    written = [*_write_pictures(folder, drawn, shown), _write_collage(folder, collage)]
    cost = {
        "estimated_seconds": plan.estimated_seconds,
        "estimated_memory_bytes": plan.estimated_memory_bytes,
        "prompt_tokens": plan.prompt_tokens,
        "prompt_tokens_limit": plan.prompt_tokens_limit,
    }
    return Written.of(folder, PLAN_NAME, {**_plan_tree(plan), **cost}, written)


def write_result(
    folder: Folder,
    collage: collage_pb2.Collage,
    work: Work,
    result: JobResult,
    drawn: PlanPictures,
) -> Written:
    """Writes a finished job's folder; `collage` carries its pictures inline."""
    folder.clear()
    written = [*_write_images(folder, result, drawn), _write_collage(folder, collage)]
    told = {**_result_tree(result), "request": _request_tree(work)}
    return Written.of(folder, RESULT_NAME, told, written)


def write_fetched(folder: Folder, result: JobResult, drawn: PlanPictures | None) -> Written:
    """Writes what a server holds of a finished job. It does not hold the collage, so there is no redo from here."""
    folder.clear()
    written = _write_images(folder, result, drawn) if drawn else []
    return Written.of(folder, RESULT_NAME, _result_tree(result), written)


def write_sweep(
    folder: Folder,
    layer: str,
    dial: str,
    values: Sequence[float],
    parts: Sequence[Path],
    rows: list[list[tuple[str, bytes]]],
) -> Written:
    """Writes what joins a sweep's folders: the contact sheet, and `sweep.json` with each value's `result.json`."""
    folder.clear()
    swept = [
        {"value": value, "result": str(part.relative_to(folder.path))}
        for value, part in zip(values, parts, strict=True)
    ]
    told = {"layer": layer, "dial": dial, "values": swept}
    return Written.of(folder, SWEEP_NAME, told, [*parts, *write_sheet(folder, rows)])


def read(folder: Path, index: int) -> Earlier:
    """Reads back a results folder with picture `index` as parent. Raises `InvalidInput` if it is none."""
    try:
        told = json.loads(_disk.text(folder / RESULT_NAME, _MAX_RESULT_BYTES))
        sampling = json_format.ParseDict(told["sampling"], collage_pb2.Sampling())
    except (
        *(_disk.Unreadable, RecursionError),
        *(ValueError, KeyError, TypeError, json_format.ParseError),
    ) as error:
        text = f"{folder} is no results folder: {RESULT_NAME} cannot be read ({error})"
        raise InvalidInput.in_field("DIR", text, reason="FILE") from error
    picture = folder / f"image-{index}.png"
    try:
        parent = _disk.picture(picture, [folder])
    except _disk.Unreadable as error:
        raise InvalidInput.in_field("--image", str(error), reason="FILE") from error
    collage = files.attach(files.load(folder))
    return Earlier(collage=collage, sampling=sampling, parent=parent)


def _write_collage(folder: Folder, collage: collage_pb2.Collage) -> Path:
    return [folder.write(name, data) for name, data in files.parts(collage).items()][-1]


def _write_images(folder: Folder, result: JobResult, drawn: PlanPictures) -> list[Path]:
    """The pictures of a job, and what its plan drew."""
    shown, written = [("composite", drawn.composite)], []
    for image, data in zip(result.job.images, result.images, strict=True):
        written.append(folder.write(f"image-{image.index}.png", data))
        shown.append((f"image {image.index}, seed {image.seed}", data))
    return [*written, *_write_pictures(folder, drawn, shown)]


def _write_pictures(
    folder: Folder, drawn: PlanPictures, shown: list[tuple[str, bytes]]
) -> list[Path]:
    composite = folder.write("composite.png", drawn.composite)
    for name, mask in drawn.masks.items():
        folder.write(f"masks/{files.file_stem(name)}.png", mask)
    return [composite, folder.path / "masks", *write_sheet(folder, [shown])]


def write_sheet(folder: Folder, rows: list[list[tuple[str, bytes]]]) -> list[Path]:
    """Writes `sheet.png` from labelled pictures; where pillow is not installed, nothing."""
    try:
        from collage_client.cli import sheet
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        return []
    return [folder.write("sheet.png", sheet.draw(rows))]


def _plan_tree(plan: pb.Plan) -> dict[str, Any]:
    """A plan as plain values, blob references replaced by the names of the files written."""
    layers = []
    for layer in plan.layers:
        layers.append({**tree(layer), "mask": f"masks/{layer.name}.png"})
    return {
        "prompt": plan.prompt,
        "sampling": tree(plan.sampling),
        "layers": layers,
        "warnings": [tree(warning) for warning in plan.warnings],
    }


def _result_tree(result: JobResult) -> dict[str, Any]:
    """A finished job as plain values."""
    job, images = result.job, []
    for image in job.images:
        entry: dict[str, Any] = {
            "file": f"image-{image.index}.png",
            "index": image.index,
            "seed": image.seed,
            "sha256": image.blob.sha256,
        }
        if image.HasField("changed_pixels"):
            entry["changed_pixels"] = image.changed_pixels
        images.append(entry)
    return {
        "job": job.name,
        "request_id": job.request_id,
        "attempts": job.attempts,
        "model": job.plan.sampling.model,
        "model_digest": job.images[0].model_digest if job.images else "",
        "images": images,
        **_plan_tree(job.plan),
        "timings_s": {**_waits(job), "stages": result.stage_seconds},
    }


def _request_tree(work: Work) -> dict[str, Any]:
    """The request without its collage, which stands in the collage file, and without picture bytes."""
    copy: Any = type(work)()
    copy.CopyFrom(work)
    copy.ClearField("collage")
    kind = {pb.GenerateWork: "generate", pb.RedoWork: "redo", pb.LearnWork: "learn"}[type(work)]
    if isinstance(copy, pb.RedoWork):
        copy.ClearField("parent")
    return {"kind": kind, **json_format.MessageToDict(copy, preserving_proto_field_name=True)}


def _waits(job: pb.Job) -> dict[str, float]:
    created, started, ended = (
        moment.ToNanoseconds() / 1e9 for moment in (job.create_time, job.start_time, job.end_time)
    )
    return {"queued": round(started - created, 3), "total": round(ended - created, 3)}
