"""Which variables of the environment reach the parts of a system that is started here.

Main function: `settings`, of one part. What the starter itself says (where the parts are and keep what they keep) is
refused by its name in the environment: it would be dropped.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from services.common.settings import InvalidSetting, ours, read, variable

# What says each of them in place of a variable.
SAID = {
    "address": "where it listens is told by --address of `collage serve`, --port of `collage cluster`",
    "http_hosts": "host names are told by --host-name",
    "http_origins": "origins are told by --origin",
    "models": "its models are told by --model",
    "blobs": "its data are told by --data",
    "jobs": "its data are told by --data",
    **dict.fromkeys(
        ("compositor", "inversion", "generator", "gateway"), "it knows where its own parts are"
    ),
}

Kind = TypeVar("Kind")


def settings(kind: type[Kind], **own: Any) -> Kind:
    """A part's settings: its own, and of the environment what is meant for it.

    Args:
        kind: one of `services.common.settings.PARTS`.
        own: fields that are told here.

    Raises:
        InvalidSetting: also for a variable that a system started here says itself.
    """
    refused = [
        f"{variable(name)} is for a process started by itself; of a system that is started here {instead}"
        for name, instead in SAID.items()
        if variable(name) in os.environ
    ]
    if refused:
        raise InvalidSetting("; ".join(refused))
    return read(kind, **own)


def steering() -> list[str]:
    """What the environment says to a server started now, as NAME=VALUE."""
    own = {variable("reuse"), variable("idle_s")}
    return sorted(f"{name}={value}" for name, value in ours(os.environ).items() if name not in own)
