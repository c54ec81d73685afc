"""What the command prints on standard output: aligned tables and short lines, made as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import CollageError, JobFailed, JobResult, files
from collage_client.cli.options import SWEPT_DIALS

# The contract's stages, in the order they run.
_STAGES = ("compose", "learn", "generate")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Columns of one width each; the first `left` ones flush left, the others flush right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def sampling(size: collage_pb2.Size | None, used: collage_pb2.Sampling) -> str:
    """How pictures are drawn, on one line; a job's record does not say the size."""
    canvas = f"{size.width} x {size.height}, " if size else ""
    return (
        f"{canvas}model {used.model}, {used.sampler}, {used.steps} steps, "
        f"guidance {used.guidance_scale:g}, seed {used.seed}"
    )


def plan(made: pb.Plan, size: collage_pb2.Size | None) -> str:
    """How a collage will be, or was, drawn: sampling, prompt, each layer's resolved dials, warnings."""
    lines = [
        sampling(size, made.sampling),
        f"prompt  {made.prompt}",
        "",
        table(
            ("layer", *SWEPT_DIALS, "covers", "shown"),
            (
                (
                    layer.name,
                    *(f"{getattr(layer, dial):.2f}" for dial in SWEPT_DIALS),
                    f"{layer.visible_fraction:.1%}",
                    f"{layer.unoccluded_fraction:.1%}",
                )
                for layer in made.layers
            ),
        ),
    ]
    if made.warnings:
        lines += ["", *(f"warning  {w.field}: {w.message} [{w.reason}]" for w in made.warnings)]
    return "\n".join([*lines, ""])


def cost(made: pb.Plan) -> str:
    """What a plan is expected to cost."""
    seconds = "time unknown"
    if made.estimated_seconds:
        low, high = made.estimated_seconds_low, made.estimated_seconds_high
        seconds = f"{made.estimated_seconds:.1f} s ({low:.1f} to {high:.1f})"
    return (
        f"expected  {seconds}, {made.estimated_memory_bytes / 2**20:.0f} MiB beyond the weights; "
        f"prompt takes {made.prompt_tokens} of {made.prompt_tokens_limit} tokens"
    )


def result(finished: JobResult, size: collage_pb2.Size | None = None) -> str:
    """A finished job: how it was drawn, how much a redo changed, where the time went."""
    job, spent = finished.job, finished.stage_seconds
    changed = [
        f"image {image.index}: {image.changed_pixels} pixels changed"
        for image in job.images
        if image.HasField("changed_pixels")
    ]
    stages = ", ".join(f"{name} {spent[name]:.2f} s" for name in _STAGES if name in spent)
    learned = [f"{layer} learned: {word}" for layer, word in finished.words.items()]
    planned = [plan(job.plan, size)] if job.HasField("plan") else []
    return "\n".join([*planned, *changed, *learned, f"{job.name} done: {stages}"])


def job(found: pb.Job) -> str:
    """One job as it stands."""
    lines = [jobs([found])]
    if found.HasField("plan"):
        lines += ["", plan(found.plan, None)]
    lines += [
        f"image {image.index}: seed {image.seed}, blob {image.blob.sha256}"
        for image in found.images
    ]
    if found.HasField("error"):
        lines.append(f"error  {found.error.message}")
    return "\n".join(lines)


def jobs(found: Sequence[pb.Job]) -> str:
    """The newest jobs."""
    return table(
        ("job", "state", "created (UTC)", "seconds"),
        (
            (
                job.name,
                pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower(),
                job.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S"),
                f"{(job.end_time.ToNanoseconds() - job.start_time.ToNanoseconds()) / 1e9:.1f}"
                if job.HasField("end_time") and job.HasField("start_time")
                else "-",
            )
            for job in found
        ),
        left=3,
    )


def words(found: Sequence[pb.Word]) -> str:
    """The learned words."""
    return table(
        ("word", "text", "model digest", "created (UTC)", "vectors"),
        (
            (
                word.name,
                word.text,
                word.model_digest[:12],
                word.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S"),
                f"{word.vector_count}",
            )
            for word in found
        ),
        left=4,
    )


def word(found: pb.Word) -> str:
    """One learned word."""
    rows = [
        ("text", found.text),
        ("vectors", f"{found.vector_count}, {found.vectors.size_bytes} bytes"),
        ("model", f"digest {found.model_digest[:12]}"),
        ("created", f"{found.create_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"),
    ]
    return "\n".join([found.name, *(f"  {name:<9} {text}" for name, text in rows)])


def model(found: pb.Model) -> str:
    """One model: its limits, samplers and defaults."""
    used = found.defaults

    def control(kind: str) -> str:
        return f"{kind} ({'drawn' if kind in found.drawn_control_kinds else 'needs an image'})"

    rows = [
        ("family", f"{found.family}, digest {found.digest[:12]}"),
        (
            "canvas",
            f"sides {found.min_side} to {found.max_side} px in steps of {found.size_multiple}, "
            f"at its best near {found.native_side}",
        ),
        ("layers", f"at most {found.max_layers}"),
        ("prompt", f"at most {found.prompt_tokens_limit} tokens"),
        ("samplers", ", ".join(found.samplers)),
        ("controls", ", ".join(map(control, found.control_kinds)) or "none"),
        ("adapters", ", ".join(found.adapters) or "none"),
        (
            "defaults",
            f"{used.sampler}, {used.steps} steps, guidance {used.guidance_scale:g}",
        ),
    ]
    return "\n".join([found.name, *(f"  {name:<9} {text}" for name, text in rows)])


def cut_out_models(found: Sequence[collage_pb2.CutOutModel]) -> str:
    """What cuts objects out, in a line."""
    names = (f"{each.name} (by points)" if each.takes_points else each.name for each in found)
    return f"cutout: {', '.join(names) or 'none'}"


def paths(written: Sequence[Path]) -> str:
    """The paths written, one a line, ready to be copied."""
    return "\n".join(["wrote", *(f"  {path}" for path in written)])


def error_tree(problem: CollageError) -> dict[str, Any]:
    """An error for programs."""
    return {
        "code": problem.code.name,
        "reason": problem.reason,
        "message": problem.message,
        "field_violations": [
            {"field": violation.field, "description": violation.description}
            for violation in problem.field_violations
        ],
        "retry_after_s": problem.retry_after_s,
        **({"job": problem.job} if isinstance(problem, JobFailed) else {}),
    }


def error(problem: CollageError, *, is_input: bool, collage_path: Path | None) -> str:
    """An error for people: the wrong fields, if there are any, and where the collage file says them."""
    head = problem.message or problem.code.name.lower().replace("_", " ")
    if problem.field_violations:
        lines = ["collage: bad input" if is_input else f"collage: {head}"]
        for violation in problem.field_violations:
            field = f"{violation.field}: " if violation.field else ""
            # What `files` found itself already says where.
            place = ""
            if collage_path is not None and problem.reason != "FILE":
                place = files.place(collage_path, violation.field)
            lines.append(f"  {field}{violation.description}" + (f" ({place})" if place else ""))
    else:
        lines = [f"collage: {head} [{problem.reason or problem.code.name}]"]
    if problem.retry_after_s is not None:
        lines.append(f"  try again in {problem.retry_after_s:g} s")
    return "\n".join(lines)
