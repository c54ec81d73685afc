"""The stages on model servers elsewhere: the same four, asked of NVIDIA Triton.

Main type: `TritonStages`. What does not change from step to step goes to a server once, under its digest; a step sends
latents, timesteps and gains. Nothing of a job is at a server alone, so any of them answers any step. The client is the
synchronous one: the generator's threads that wait for a network wait for it here, and an event loop between would cost
each step a change of threads.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from services.common.collage import Adapter
from services.common.errors import Internal
from services.common.telemetry import request_id
from services.common.weights import ModelError
from services.diffusion.facts import ModelFacts
from services.diffusion.text import Text, TextStates
from services.generator.call import ControlPicture, Given, Rows
from services.generator.card import GeneratorCard
from services.generator.folder_card import FolderCard
from services.generator.triton import wire
from services.generator.triton.host import Spec
from services.generator.triton.repository import name_of
from services.generator.triton.servers import Server, Servers, Tensors

# What is remembered of a server's is forgotten then: it is given a few things twice.
_MOST_HELD = 10_000


class TritonStages:
    """The stages of one model on servers.

    Args:
        card: the model's.
        servers: who is asked.
        may_share: whether a U-Net call may hold rows of others, see `COLLAGE_MAX_ROWS`.
    """

    def __init__(self, card: GeneratorCard, servers: Servers, *, may_share: bool) -> None:
        self._card = card
        self._servers = servers
        self._may_share = may_share
        self._is_wanted: Callable[[], bool] = lambda: True
        self._packed: WeakKeyDictionary[Given, wire.Packed] = WeakKeyDictionary()
        self._pictures: WeakKeyDictionary[ControlPicture, bytes] = WeakKeyDictionary()

    @property
    def facts(self) -> ModelFacts:
        """The model's facts."""
        return self._card.facts

    @property
    def device(self) -> torch.device:
        """Where latents and texts live: here."""
        return torch.device("cpu")

    def while_wanted(self, is_wanted: Callable[[], bool]) -> "TritonStages":
        """See `Stages`."""
        stages = copy.copy(self)
        stages._is_wanted = is_wanted
        return stages

    def load_controlnets(self, kinds: Sequence[str]) -> None:
        """See `Stages`. Servers load one with its first use."""

    def encode_text(self, texts: Sequence[Text], adapters: Sequence[Adapter] = ()) -> TextStates:
        """See `Stages`."""
        data = wire.pack_texts(texts, adapters)
        has_pooled = bool(self.facts.pooled_width)
        answer = self._ask(
            "encode_text",
            lambda _: {"texts": torch.frombuffer(bytearray(data), dtype=torch.uint8)},
            ["hidden", "pooled"] if has_pooled else ["hidden"],
        )
        return TextStates(hidden_BTD=answer["hidden"], pooled_BP=answer.get("pooled"))

    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        return self._ask("encode_image", lambda _: {"rgb": rgb_BHWC.contiguous()}, ["z"])["z"]

    def predict(self, rows: Sequence[Rows]) -> torch.Tensor:
        """See `Stages`."""
        packed = [self._given(each.given) for each in rows]
        counts = torch.tensor([each.given.count for each in rows])
        timestep_R = torch.tensor([each.timestep for each in rows])
        gain_R = torch.tensor([each.gain for each in rows])
        step = {
            "x": torch.cat([each.x_NChw for each in rows]),
            "timestep": timestep_R.repeat_interleave(counts)[:, None],
            "gain": gain_R.repeat_interleave(counts)[:, None],
            "key": wire.keys_of(rows, [each.digest for each in packed]),
        }
        name = name_of(self._card.name, "predict")

        def inputs(server: Server) -> dict[str, torch.Tensor]:
            items = _lacking(packed, server.held.setdefault(name, set()))
            return {**step, "items": wire.pack_items(items, len(step["x"]))} if items else step

        return self._ask("predict", inputs, ["noise"])["noise"]

    def decode_image(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        return self._ask("decode_image", lambda _: {"z": z_BChw.contiguous()}, ["rgb"])["rgb"]

    def _ask(
        self,
        stage: str,
        inputs: Callable[[Server], Tensors],
        outputs: Sequence[str],
    ) -> dict[str, torch.Tensor]:
        return self._servers.ask(
            name_of(self._card.name, stage),
            inputs,
            outputs=outputs,
            is_wanted=self._is_wanted,
            parameters={"digest": self._card.digest, "may_share": self._may_share},
            request_id=request_id.get(),
        )

    def _given(self, given: Given) -> wire.Packed:
        if given not in self._packed:
            self._packed[given] = wire.pack_given(given, self._picture)
        return self._packed[given]

    def _picture(self, picture: ControlPicture) -> bytes:
        if picture not in self._pictures:
            self._pictures[picture] = wire.pack_picture(picture)
        return self._pictures[picture]


def as_served(card: FolderCard, servers: Servers) -> FolderCard:
    """The card of a model as it is at the servers, whose device is not this machine's.

    Raises:
        Unavailable: no server answers.
        ModelError: theirs is another model, or none of that name.
    """
    spec = Spec.from_json(servers.parameter(name_of(card.name, "predict"), "collage"))
    if spec.digest != card.digest:
        raise ModelError(
            f"the model servers have another model of that name: {spec.digest[:12]}, here is {card.digest[:12]}; "
            "write their repository anew"
        )
    return replace(
        card,
        arithmetic=spec.arithmetic,
        device_bytes=spec.device_bytes,
        unet_value_bytes=spec.unet_value_bytes,
        vae_value_bytes=spec.vae_value_bytes,
    )


def probe(card: GeneratorCard, servers: Servers) -> None:
    """A tiny true inference of every stage: a server says that it is ready while its process for a model is dead.

    Raises:
        Unavailable: one does not answer.
        Internal: it answers what it should not.
    """
    facts, stages = card.facts, TritonStages(card, servers, may_share=False)
    text = stages.encode_text([Text(ids_ET=facts.tokenize("").ids_ET)])
    side = facts.size_multiple
    z_1Chw = stages.encode_image(torch.zeros(1, side, side, 3, dtype=torch.uint8))
    scale = None if facts.guidance_width is None else 1.0
    given = Given(count=1, text=text, guidance_scale=scale)
    noise_1Chw = stages.predict([Rows(given=given, x_NChw=z_1Chw, timestep=1.0)])
    stages.decode_image(z_1Chw)
    if not bool(noise_1Chw.isfinite().all()):
        raise Internal("the U-Net answers what is not finite", reason="NOT_FINITE")


def _lacking(packed: Sequence[wire.Packed], held: set[bytes]) -> list[bytes]:
    """What a server is not known to hold, control pictures before what names them; from then on it is known to."""
    if len(held) > _MOST_HELD:
        held.clear()
    items = []
    for each in packed:
        if each.digest in held:
            continue
        for key, data in each.pictures.items():
            if key not in held:
                items.append(data)
                held.add(key)
        items.append(each.data)
        held.add(each.digest)
    return items
