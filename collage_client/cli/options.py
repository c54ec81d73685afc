"""Options that several commands share, and the values that options take."""

from __future__ import annotations

import argparse
from pathlib import Path

from collage_client._collage import DIALS

SWEPT_DIALS = (*DIALS, "opacity")
MAX_SWEEP_VALUES = 16
# What names a collage.
COLLAGE = "a collage.yaml or its folder; an .ora, .psd or .zip file"


def dial(text: str) -> tuple[str, list[float]]:
    """Reads `noise=0:1:5`: a dial's name, and that many values from the first to the last, both included."""
    name, _, span = text.partition("=")
    try:
        first, last, count = span.split(":")
        start, stop, steps = float(first), float(last), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=FIRST:LAST:COUNT, for example noise=0:1:5"
        ) from None
    if name not in SWEPT_DIALS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SWEPT_DIALS)}")
    if not (0 <= start <= 1 and 0 <= stop <= 1):
        raise argparse.ArgumentTypeError(f"{name} goes from 0 to 1, not {start:g} to {stop:g}")
    if not 2 <= steps <= MAX_SWEEP_VALUES:
        raise argparse.ArgumentTypeError(f"2 to {MAX_SWEEP_VALUES} values, not {steps}")
    return name, [start + (stop - start) * k / (steps - 1) for k in range(steps)]


def place(text: str) -> tuple[float, float]:
    """Reads `0.5,0.25`: fractions of a picture's width and height."""
    x, _, y = text.partition(",")
    try:
        found = float(x), float(y)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y, for example 0.5,0.25") from None
    if not all(0 <= part <= 1 for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} goes beyond the picture; allowed: 0 to 1")
    return found


def count(text: str) -> int:
    """Reads a whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def adapter(text: str) -> tuple[str, float]:
    """Reads `ink` or `ink=0.8`: an adapter's name and weight."""
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{weight!r} is no number; NAME or NAME=WEIGHT") from None


def port(text: str) -> int:
    """Reads a port, 0 for a free one."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 0 to 65535")
    return int(text)


def address(text: str) -> str:
    """Reads host:port."""
    host, _, number = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, for example 127.0.0.1:8080")
    port(number)
    return text


def size(text: str) -> tuple[int, int]:
    """Reads `128x96` or `128`: a canvas' width and height in pixels."""
    width, _, height = text.lower().partition("x")
    try:
        return count(width), count(height or width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; WIDTHxHEIGHT or SIDE") from None


def add_path(parser: argparse.ArgumentParser) -> None:
    """The collage."""
    parser.add_argument("path", metavar="PATH", type=Path, help=COLLAGE)
    add_allow(parser)
    add_size(parser)


def add_size(parser: argparse.ArgumentParser) -> None:
    """What its canvas becomes."""
    parser.add_argument(
        "--size",
        metavar="WxH",
        type=size,
        help="make its canvas this size, and all on it larger or smaller to fit (default: as it is)",
    )


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Where its pictures may lie."""
    parser.add_argument(
        "--allow",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="let the collage name pictures of this folder too, beside its own; may be repeated",
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """The folder that is written."""
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder to write, made if absent"
    )


def add_data(parser: argparse._ActionsContainer, *, again: bool = False) -> None:
    """Where a server here keeps its things; `again` as for `add_server`."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        default=argparse.SUPPRESS if again else Path("data"),
        help="where a server here keeps jobs and pictures (default: ./data)",
    )


def add_server(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """Which server. `again`: the command above takes the same options, whose values count if not repeated."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="ADDR",
        default=argparse.SUPPRESS if again else "",
        help="host:port of a running server (default: the one that works with --data; else one is started)",
    )
    group.add_argument(
        "--no-reuse",
        action="store_true",
        default=argparse.SUPPRESS if again else False,
        help="start a server for this command alone (COLLAGE_REUSE=0: always)",
    )
    add_data(parser, again=again)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn."""
    group = parser.add_argument_group("sampling", "What is left out is the model's default.")
    group.add_argument(
        "--images", metavar="N", type=int, help="how many pictures, 1 to 16 (default: 1)"
    )
    group.add_argument(
        "--seed", metavar="S", type=int, help="0 to 2^64 - 1; picture k uses S + k (default: drawn)"
    )
    group.add_argument("--steps", metavar="N", type=int, help="denoising steps at noise 1")
    group.add_argument(
        "--guidance", metavar="G", type=float, help="guidance scale, 0 to 50; 1 or less is none"
    )
    group.add_argument("--sampler", metavar="NAME", default="", help="see `collage models`")
    group.add_argument(
        "--adapter",
        metavar="NAME[=W]",
        type=adapter,
        action="append",
        default=[],
        help="draw with this adapter (LoRA), its weight -2 to 2 (default: 1); may be repeated",
    )
    group.add_argument(
        "--model",
        metavar="M",
        default="",
        help="a served model's name; without --server also what to serve: a model folder, hub:OWNER/NAME@REVISION "
        "or a models.yaml",
    )


def add_served(parser: argparse.ArgumentParser) -> None:
    """What a server that is started serves, and how."""
    parser.add_argument(
        "--model",
        metavar="M",
        default="",
        help="model folder, hub:OWNER/NAME@REVISION, or models.yaml (default: the bundled model)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=count,
        default=0,
        help="CPU threads of one operation of a network (default: one a core)",
    )


def add_door(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Where browsers and scripts come in, and who of them."""
    group = parser.add_argument_group(
        "HTTP", "The page, gRPC-Web, JSON and blobs; see docs/http.md."
    )
    group.add_argument(
        "--http",
        metavar="ADDR",
        type=address,
        default=default,
        help=f"host:port to answer HTTP on (default: {default or 'none'})",
    )
    group.add_argument(
        "--host-name",
        metavar="NAME",
        action="append",
        default=[],
        help="answer to this host name too, beside this machine's own and the one listened on; may be repeated",
    )
    group.add_argument(
        "--origin",
        metavar="URL",
        action="append",
        default=[],
        help="let pages of this other origin in (https://HOST); may be repeated",
    )


def add_output(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """How it is said; `again` as for `add_server`."""
    group = parser.add_argument_group("output")
    default = argparse.SUPPRESS if again else False
    group.add_argument(
        "--json",
        action="store_true",
        default=default,
        help="results, and errors, as JSON on standard output",
    )
    group.add_argument(
        "--quiet", action="store_true", default=default, help="no progress and no notes"
    )
