"""One stage of one model as a model server has it: the networks it needs, and what it was given to keep.

Main type: `Host`, around the same `TorchStages` that run in a generator. It knows nothing of Triton: `model.py` stands
between. What a `predict` needs of a job is held under its digest, the least recently used goes, and whoever names what
is not held is told so: a host that was started a moment ago answers as any other.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from services.common.collage import Adapter
from services.common.errors import CollageError
from services.diffusion import device
from services.diffusion.networks import load
from services.diffusion.text import TextStates
from services.generator.call import ControlPicture, Given, Rows
from services.generator.stages import TorchStages
from services.generator.triton import wire

# The parts of a model that a stage computes with.
_PARTS = {
    "encode_text": ("text_encoder", "text_encoder_2"),
    "encode_image": ("vae",),
    "predict": ("unet",),
    "decode_image": ("vae",),
}


Data = TypeVar("Data")
Found = TypeVar("Found")


class Failure(Exception):
    """A request that cannot be answered; the text is what `wire.failure` made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Which stage of which model, as it stands in the server's configuration.

    folder, digest, dtype, device, controlnets, adapters: as its card has them; and so arithmetic, device_bytes and the
    bytes of a value, which generators elsewhere cannot see. threads: CPU threads of one operation. kept_bytes: what is
    held of jobs.
    """

    stage: str
    folder: str
    digest: str
    dtype: str
    device: str
    controlnets: Mapping[str, str]
    adapters: Mapping[str, str]
    arithmetic: str
    device_bytes: int
    unet_value_bytes: int
    vae_value_bytes: int
    threads: int
    kept_bytes: int

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """Of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A request of `predict`: see `services.generator.call.Rows` and `wire.keys_of`.

    digest: of the model. x_BChw, timestep_B, gain_B: of each row. key_BK: where what it is given is found. items: what
    comes along to be held, of `wire.pack_items`. may_share: whether its rows may be computed with those of others,
    which changes their last bits.
    """

    digest: str
    x_BChw: torch.Tensor
    timestep_B: torch.Tensor
    gain_B: torch.Tensor
    key_BK: torch.Tensor
    items: torch.Tensor | None = None
    may_share: bool = False


class Kept:
    """What jobs' calls have in common, by digest, within so many bytes; one call's own may take more for its time."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        # The one used last stands last. Of a `Given` one for each number of rows.
        self._held: OrderedDict[bytes, ControlPicture | dict[int, Given]] = OrderedDict()
        self._sizes: dict[bytes, int] = {}

    @property
    def size_bytes(self) -> int:
        """What is held."""
        return sum(self._sizes.values())

    def put(self, items: Sequence[bytes]) -> None:
        """Holds these: control pictures, and what names them behind them. Raises `Failure` for what they lack."""
        for data in items:
            key = wire.digest(data)
            if key not in self._held:
                self._held[key] = _parsed(self._unpacked, data)
                self._sizes[key] = len(data)
            self._held.move_to_end(key)

    def given(self, keys: Sequence[tuple[bytes, int]]) -> list[Given]:
        """For each digest and count what is held. Raises `Failure` that names what is not."""
        found: list[Given] = []
        missing = []
        for key, count in keys:
            counts = self._held.get(key)
            if not isinstance(counts, dict):
                missing.append(key)
                continue
            self._held.move_to_end(key)
            found.append(counts.setdefault(count, replace(counts[1], count=count)))
        if missing:
            raise Failure(_not_held(missing))
        return found

    def trim(self) -> None:
        """Lets go what was used least recently, down to the limit."""
        left_bytes = self.size_bytes
        while left_bytes > self._limit_bytes:
            key, _ = self._held.popitem(last=False)
            left_bytes -= self._sizes.pop(key)

    def _unpacked(self, data: bytes) -> ControlPicture | dict[int, Given]:
        if wire.is_picture(data):
            return wire.unpack_picture(data)
        pictures = {key: self._held.get(key) for key in wire.pictures_of(data)}
        found = {key: each for key, each in pictures.items() if isinstance(each, ControlPicture)}
        if missing := pictures.keys() - found.keys():
            # This too: it comes again with them.
            raise Failure(_not_held([wire.digest(data), *missing]))
        for key in found:
            self._held.move_to_end(key)
        return {1: wire.unpack_given(data, found)}


class Host:
    """A stage. One thread at a time."""

    def __init__(self, spec: Spec) -> None:
        """Loads what the stage computes with.

        Raises:
            ModelError: it cannot be loaded.
        """
        device.own(spec.threads)
        self.spec = spec
        self._kept = Kept(spec.kept_bytes)
        self._stages = TorchStages(
            load(
                Path(spec.folder),
                dtype=getattr(torch, spec.dtype),
                device=torch.device(spec.device),
                controlnets={kind: Path(each) for kind, each in spec.controlnets.items()},
                adapters={name: Path(each) for name, each in spec.adapters.items()},
                parts=_PARTS[spec.stage],
            )
        )

    def check(self, digest: str) -> None:
        """Raises `Failure` where a caller means another model than this one, whose steps cannot be mixed with its."""
        if digest != self.spec.digest:
            message = f"has {self.spec.digest[:12]}, asked for {digest[:12]}"
            raise Failure(wire.failure(wire.OTHER_MODEL, message))

    @property
    def kept_bytes(self) -> int:
        """What is held of jobs."""
        return self._kept.size_bytes

    def encode_text(self, data: bytes) -> TextStates:
        """Of `wire.pack_texts`."""
        texts, adapters = _parsed(wire.unpack_texts, data)
        return self._stages.encode_text(texts, adapters)

    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        return self._stages.encode_image(rgb_BHWC)

    def decode_image(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        return self._stages.decode_image(z_BChw.to(self._stages.device))

    def predict(self, asked: Sequence[Asked]) -> list[torch.Tensor | Failure]:
        """What the U-Net says to each request; those that may share are one call where nothing forbids it.

        A request that cannot be answered fails alone: where a call of several fails, each tries by itself.
        """
        answers: dict[int, torch.Tensor | Failure] = {}
        ready: dict[int, list[Rows]] = {}
        for index, each in enumerate(asked):
            try:
                ready[index] = self._rows(each)
            except Failure as failed:
                answers[index] = failed
        for group in _groups(asked, ready):
            answers |= self._together({index: ready[index] for index in group})
        self._kept.trim()
        return [answers[index] for index in range(len(asked))]

    def _rows(self, asked: Asked) -> list[Rows]:
        self.check(asked.digest)
        if asked.items is not None:
            self._kept.put(_parsed(wire.unpack_items, asked.items))
        keys = _parsed(wire.runs_of, asked.key_BK)
        rows, start = [], 0
        for given, (_, count) in zip(self._kept.given(keys), keys, strict=True):
            own = slice(start, start + count)
            rows.append(
                Rows(
                    given=given,
                    x_NChw=asked.x_BChw[own].to(self._stages.device),
                    timestep=float(asked.timestep_B[start]),
                    gain=float(asked.gain_B[start]),
                )
            )
            start += count
        return rows

    def _together(self, group: Mapping[int, list[Rows]]) -> dict[int, torch.Tensor | Failure]:
        """Requests as one call; on the seam rows that steer come last, whosever they are."""
        parts = [(index, rows) for index, own in group.items() for rows in own]
        parts.sort(key=lambda part: part[1].given.steering is not None)
        try:
            prediction_BChw = self._stages.predict([rows for _, rows in parts])
        except Exception as error:
            failure = error
        else:
            counts = [rows.given.count for _, rows in parts]
            answered: dict[int, list[torch.Tensor]] = {index: [] for index in group}
            for (index, _), prediction in zip(
                parts, torch.split(prediction_BChw, counts), strict=True
            ):
                answered[index].append(prediction)
            return {index: torch.cat(each) for index, each in answered.items()}
        # Outside the handler: what is handled holds all that the failed call held.
        device.recover(self._stages.device, failure, who="model server")
        if len(group) > 1:
            return {
                key: value
                for index, rows in group.items()
                for key, value in self._together({index: rows}).items()
            }
        return {index: Failure(told(failure)) for index in group}


def told(error: Exception) -> str:
    """What a caller is told of an error."""
    if isinstance(error, Failure):
        return str(error)
    if device.is_out_of_memory(error):
        return wire.failure("OUT_OF_MEMORY", str(error))
    reason = error.reason if isinstance(error, CollageError) else "INTERNAL"
    return wire.failure(reason, str(error) or type(error).__name__)


def _groups(asked: Sequence[Asked], ready: Mapping[int, list[Rows]]) -> list[list[int]]:
    """Which requests are one call: those that may share, with the same adapters on; every other one is its own."""
    shared: dict[tuple[Adapter, ...], list[int]] = {}
    groups = []
    for index, rows in ready.items():
        if asked[index].may_share:
            shared.setdefault(rows[0].given.adapters, []).append(index)
        else:
            groups.append([index])
    return [*groups, *shared.values()]


def _not_held(keys: Sequence[bytes]) -> str:
    missing = sorted({key.hex() for key in keys})
    return wire.failure(wire.NOT_HELD, f"{len(missing)} things are not held", missing=missing)


def _parsed(read: Callable[[Data], Found], data: Data) -> Found:
    try:
        return read(data)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Failure(wire.failure("INTERNAL", f"no request: {error}")) from error
