"""A model repository of Triton's: a folder for each stage of each served model, written from the generator's settings.

Main function: `write`. Each has a `config.pbtxt`, which says all that its `Host` needs to know, and the one `model.py`.
The server's Python has to find this project's packages, see docs/triton.md.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.telemetry import log
from services.generator.folder_card import FolderCard
from services.generator.triton import wire
from services.generator.triton.host import Spec

MODEL_FILE = Path(__file__).with_name("model.py")
# Rows of one U-Net call, whosever they are: several times what a GPU is full with.
MAX_ROWS = 64
# What jobs have given is held on the server's machine, not on its GPU.
KEPT_BYTES = 2**30


def name_of(model: str, stage: str) -> str:
    """What Triton calls a stage of a model."""
    return f"{model}.{stage}"


def write(
    cards: Sequence[FolderCard],
    folder: Path,
    *,
    threads: int,
    instances: Mapping[str, int] | None = None,
) -> list[str]:
    """Writes the repository of these models, and answers the names of what Triton is to load.

    Args:
        cards: of the models.
        folder: made where absent; models that are not named stay.
        threads: CPU threads of one operation of each stage.
        instances: how many of a stage, each with its own weights; one where nothing is said.
    """
    names = []
    for card in cards:
        for stage in wire.STAGES:
            name = name_of(card.name, stage)
            (folder / name / "1").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(MODEL_FILE, folder / name / "1" / "model.py")
            text = _config(card, stage, threads=threads, instances=(instances or {}).get(stage, 1))
            (folder / name / "config.pbtxt").write_text(text)
            names.append(name)
            log.info("model written", name=name, folder=str(folder / name))
    return names


def _config(card: FolderCard, stage: str, *, threads: int, instances: int) -> str:
    spec = Spec(
        stage=stage,
        folder=str(card.folder.resolve()),
        digest=card.digest,
        dtype=str(card.dtype).removeprefix("torch."),
        device=str(card.device),
        controlnets={kind: str(each.resolve()) for kind, each in card.controlnet_folders.items()},
        adapters={name: str(each.resolve()) for name, each in card.adapter_files.items()},
        arithmetic=card.arithmetic,
        device_bytes=card.device_bytes,
        unet_value_bytes=card.unet_value_bytes,
        vae_value_bytes=card.vae_value_bytes,
        threads=threads,
        kept_bytes=KEPT_BYTES,
    )
    kind = "KIND_GPU" if card.device.type == "cuda" else "KIND_CPU"
    gpus = f" gpus: [ {card.device.index or 0} ]" if card.device.type == "cuda" else ""
    return "\n".join(
        [
            "# Written by python -m services.generator.triton write.",
            f"name: {_quoted(name_of(card.name, stage))}",
            'backend: "python"',
            *_shapes(stage, card.facts.latent_channels, has_pooled=bool(card.facts.pooled_width)),
            f"instance_group [ {{ count: {instances} kind: {kind}{gpus} }} ]",
            f'parameters {{ key: "collage" value {{ string_value: {_quoted(spec.to_json())} }} }}',
            "",
        ]
    )


def _shapes(stage: str, channels: int, *, has_pooled: bool) -> list[str]:
    """Inputs and outputs. Only the U-Net's rows are batched: a picture's bytes depend on what is decoded beside it."""
    if stage == "predict":
        latent = f"TYPE_FP32 dims: [ {channels}, -1, -1 ]"
        return [
            f"max_batch_size: {MAX_ROWS}",
            # No delay: what waits while a call runs is the next call's.
            "dynamic_batching { }",
            f'input [ {{ name: "x" data_type: {latent} }},',
            '  { name: "timestep" data_type: TYPE_FP32 dims: [ 1 ] },',
            '  { name: "gain" data_type: TYPE_FP32 dims: [ 1 ] },',
            f'  {{ name: "key" data_type: TYPE_UINT8 dims: [ {wire.KEY_BYTES} ] }},',
            '  { name: "items" data_type: TYPE_UINT8 dims: [ -1 ] optional: true } ]',
            f'output [ {{ name: "noise" data_type: {latent} }} ]',
        ]
    latents = f"TYPE_FP32 dims: [ -1, {channels}, -1, -1 ]"
    pictures = "TYPE_UINT8 dims: [ -1, -1, -1, 3 ]"
    inputs, outputs = {
        "encode_text": (
            {"texts": "TYPE_UINT8 dims: [ -1 ]"},
            {"hidden": "TYPE_FP32 dims: [ -1, -1, -1 ]"}
            | ({"pooled": "TYPE_FP32 dims: [ -1, -1 ]"} if has_pooled else {}),
        ),
        "encode_image": ({"rgb": pictures}, {"z": latents}),
        "decode_image": ({"z": latents}, {"rgb": pictures}),
    }[stage]
    return [
        "max_batch_size: 0",
        f"input [ {_tensors(inputs)} ]",
        f"output [ {_tensors(outputs)} ]",
    ]


def _tensors(named: Mapping[str, str]) -> str:
    return ", ".join(f'{{ name: "{name}" data_type: {shape} }}' for name, shape in named.items())


def _quoted(text: str) -> str:
    """A string of a text-format file: JSON's escapes are among its own."""
    return json.dumps(text)
