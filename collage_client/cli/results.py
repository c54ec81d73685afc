"""Results folders: what a finished job leaves on disk, and what `redo` reads back.

A folder holds `image-0.png` ..., `composite.png`, `masks/NAME.png`, `sheet.png`, a self-contained `collage.yaml`
and `result.json` (job, model, seeds, every resolved dial, warnings, timings, request), which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import AsyncCollageClient, JobResult, files
from collage_client._client import Work
from collage_client._errors import InvalidInput
from collage_client.cli.folder import Folder

RESULT_NAME = "result.json"
PLAN_NAME = "plan.json"
SWEEP_NAME = "sweep.json"


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


async def plan_pictures(client: AsyncCollageClient, plan: pb.Plan) -> PlanPictures:
    """Fetches composite and masks of a plan."""
    return PlanPictures(
        composite=await client.fetch(plan.composite),
        masks={layer.name: await client.fetch(layer.mask) for layer in plan.layers},
    )


def write_plan(
    folder: Folder, collage: collage_pb2.Collage, plan: pb.Plan, drawn: PlanPictures
) -> list[Path]:
    """Writes a plan: composite, masks, sheet, collage file, `plan.json`.

    Returns the paths; that of `masks` stands for its files.
    """
    folder.clear()
    shown = [("composite", drawn.composite), *drawn.masks.items()]
    written = [*_write_pictures(folder, drawn, shown), _write_collage(folder, collage)]
    cost = {
        "estimated_seconds": plan.estimated_seconds,
        "estimated_memory_bytes": plan.estimated_memory_bytes,
        "prompt_tokens": plan.prompt_tokens,
        "prompt_tokens_limit": plan.prompt_tokens_limit,
    }
    return [*written, _write_json(folder, PLAN_NAME, {**plan_tree(plan), **cost})]


def write_result(
    folder: Folder,
    collage: collage_pb2.Collage,
    work: Work,
    result: JobResult,
    drawn: PlanPictures,
) -> list[Path]:
    """Writes a finished job's folder; `collage` carries its pictures inline.

    Returns the paths; that of `masks` stands for its files.
    """
    folder.clear()
    job = result.job
    written, shown, images = [], [("composite", drawn.composite)], []
    for image, data in zip(job.images, result.images, strict=True):
        target = folder.write(f"image-{image.index}.png", data)
        written.append(target)
        shown.append((f"image {image.index}, seed {image.seed}", data))
        entry = {
            "file": target.name,
            "index": image.index,
            "seed": image.seed,
            "sha256": image.blob.sha256,
        }
        if image.HasField("changed_pixels"):
            entry["changed_pixels"] = image.changed_pixels
        images.append(entry)
    written += [*_write_pictures(folder, drawn, shown), _write_collage(folder, collage)]
    tree = {
        "job": job.name,
        "request_id": job.request_id,
        "attempts": job.attempts,
        "model": job.plan.sampling.model,
        "model_digest": job.images[0].model_digest if job.images else "",
        "images": images,
        **plan_tree(job.plan),
        "timings_s": {**_waits(job), "stages": result.stage_seconds},
        "request": _request_tree(work),
    }
    return [*written, _write_json(folder, RESULT_NAME, tree)]


def write_sweep(
    folder: Folder,
    layer: str,
    dial: str,
    values: Sequence[float],
    parts: Sequence[Path],
    rows: list[list[tuple[str, bytes]]],
) -> list[Path]:
    """Writes what joins a sweep's folders: the contact sheet, and `sweep.json` with each value's `result.json`."""
    folder.clear()
    swept = [
        {"value": value, "result": str(part.relative_to(folder.path))}
        for value, part in zip(values, parts, strict=True)
    ]
    tree = {"layer": layer, "dial": dial, "values": swept}
    return [*write_sheet(folder, rows), _write_json(folder, SWEEP_NAME, tree)]


def read(folder: Path, index: int) -> Earlier:
    """Reads back a results folder with picture `index` as parent. Raises `InvalidInput` if it is none."""
    try:
        tree = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
        sampling = json_format.ParseDict(tree["sampling"], collage_pb2.Sampling())
    except (OSError, ValueError, KeyError, TypeError, json_format.ParseError) as error:
        text = f"{folder} is no results folder: {RESULT_NAME} cannot be read ({error})"
        raise InvalidInput.in_field("DIR", text, reason="FILE") from error
    picture = folder / f"image-{index}.png"
    if not picture.is_file():
        raise InvalidInput.in_field("--image", f"there is no {picture}", reason="FILE")
    collage = files.attach(files.load(folder))
    return Earlier(collage=collage, sampling=sampling, parent=picture.read_bytes())


def _write_collage(folder: Folder, collage: collage_pb2.Collage) -> Path:
    return [folder.write(name, data) for name, data in files.parts(collage).items()][-1]


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


def plan_tree(plan: pb.Plan) -> dict[str, Any]:
    """A plan as plain values, blob references replaced by the names of the files written."""
    layers = []
    for layer in plan.layers:
        tree = _tree(layer)
        tree["mask"] = f"masks/{layer.name}.png"
        layers.append(tree)
    return {
        "prompt": plan.prompt,
        "sampling": _tree(plan.sampling),
        "layers": layers,
        "warnings": [_tree(warning) for warning in plan.warnings],
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


def _tree(message: Message) -> dict[str, Any]:
    """A message as plain values. Zeros are written out: a dial of 0 is a decision, not an absence."""
    tree: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    if tree.get("seed") is not None:
        tree["seed"] = int(tree["seed"])
    return tree


def _waits(job: pb.Job) -> dict[str, float]:
    created, started, ended = (
        moment.ToNanoseconds() / 1e9 for moment in (job.create_time, job.start_time, job.end_time)
    )
    return {"queued": round(started - created, 3), "total": round(ended - created, 3)}


def _write_json(folder: Folder, name: str, tree: Mapping[str, Any]) -> Path:
    return folder.write(name, f"{json.dumps(tree, indent=2, ensure_ascii=False)}\n".encode())
