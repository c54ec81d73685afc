"""The command `collage`: arguments, help texts, exit codes. What a subcommand does stands in `actions`.

Exit codes: 0 done, 1 failed, 2 bad input (the field is named), 130 interrupted (the job is cancelled).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from collage_client._errors import CollageError
from collage_client.cli import actions, report

SWEPT_DIALS = ("noise", "attract", "repel", "opacity")
MAX_SWEEP_VALUES = 16
_BAD_INPUT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)

_INTRODUCTION = """\
Turns a stack of cut-out pictures into one coherent picture (Collage Diffusion).

A collage is a file, collage.yaml: a canvas, a prompt, and layers from back to front, each with its picture, its
words, its place and three dials, all 0 to 1:
  noise    how far the layer may move from its cut-out: 0 keeps every pixel, 1 only the place
  attract  how much attention its words gain where it stands
  repel    how much attention its words lose elsewhere
A dial that is left out is chosen from the layer's size; `collage plan` shows the value.
"""
_START = """\
to begin:
  collage plan examples/bento --out out/plan          what would be drawn, and draw nothing
  collage generate examples/bento --out out/bento     draw it
  collage redo out/bento --layer rice --out out/two   draw one layer again, keep every other pixel
  collage sweep examples/bento --layer rice --dial noise=0:1:5 --out out/sweep

exit codes: 0 done, 1 failed, 2 bad input (the field is named), 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; `argv` defaults to the process' arguments. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["cluster"]:
        return _cluster(arguments[1:])
    args = _parser().parse_args(arguments)
    try:
        asyncio.run(args.action(args))
    except KeyboardInterrupt:
        print("collage: interrupted", file=sys.stderr)
        return 130
    except CollageError as problem:
        is_input = problem.code in _BAD_INPUT
        path = getattr(args, "path", None) or getattr(args, "folder", None)
        print(report.error(problem, is_input=is_input, collage_path=path), file=sys.stderr)
        return 2 if is_input else 1
    except OSError as problem:
        print(f"collage: {problem}", file=sys.stderr)
        return 1
    return 0


def _cluster(arguments: list[str]) -> int:
    """`collage cluster` has arguments of its own and needs what a caller does not have installed."""
    try:
        from local import cluster
    except ModuleNotFoundError as error:
        print(f"collage: no cluster here, {error.name} is not installed", file=sys.stderr)
        return 1
    return cluster.main(arguments)


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


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _adapter(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{weight!r} is no number; NAME or NAME=WEIGHT") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="collage",
        description=_INTRODUCTION,
        epilog=_START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, action: object, line: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=line,
            description=f"{line}\n\n{more}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(action=action)
        return sub

    sub = command("serve", actions.serve, "Run all services in this process until Ctrl-C.")
    sub.add_argument(
        "--address", default="127.0.0.1:50051", help="host:port (default: %(default)s)"
    )
    sub.add_argument(
        "--model",
        default="",
        help="model folder, hub id, or models.yaml (default: the bundled model)",
    )
    _add_data(sub)
    sub.set_defaults(server="")

    sub = command(
        "generate",
        actions.generate,
        "Draw a collage.",
        "Writes image-0.png and so on, composite.png, masks/, sheet.png (all of them side by side),\n"
        "collage.yaml with its pictures, and result.json: every seed and every dial as used.",
    )
    _add_path(sub)
    sub.add_argument(
        "--skip-failed-words",
        action="store_true",
        help="draw a layer whose word cannot be learned without it (default: fail)",
    )
    _add_out(sub)
    _add_sampling(sub)
    _add_server(sub)

    sub = command(
        "plan",
        actions.plan,
        "Show what would be drawn, without drawing it.",
        "Resolves every dial, draws composite and masks, warns of hidden layers and lost words, estimates\n"
        "the cost. Runs no model.",
    )
    _add_path(sub)
    _add_out(sub)
    _add_sampling(sub)
    _add_server(sub)

    sub = command(
        "redo",
        actions.redo,
        "Draw layers of an earlier result again.",
        "Every pixel outside the layers' masks stays byte for byte. The new folder can be redone in turn.",
    )
    sub.add_argument("folder", metavar="DIR", type=Path, help="results folder of generate or redo")
    sub.add_argument(
        "--layer", metavar="NAME", action="append", required=True, help="layer; may be repeated"
    )
    sub.add_argument(
        "--noise", metavar="X", type=float, help="its noise now, 0 to 1 (default: as before)"
    )
    sub.add_argument(
        "--image", metavar="K", type=int, default=0, help="which picture of DIR (default: 0)"
    )
    sub.add_argument("--seed", metavar="S", type=int, help="0 to 2^64 - 1 (default: a new one)")
    sub.add_argument(
        "--model", metavar="M", default="", help="as for generate (default: as before)"
    )
    _add_out(sub)
    _add_server(sub)

    sub = command(
        "sweep",
        actions.sweep,
        "Draw a collage once for each value of one dial, all with one seed.",
        "Writes a results folder for each value and one labelled contact sheet, sheet.png.",
    )
    _add_path(sub)
    sub.add_argument("--layer", metavar="NAME", required=True, help="the layer whose dial moves")
    sub.add_argument(
        "--dial",
        metavar="NAME=FIRST:LAST:COUNT",
        type=dial,
        required=True,
        help=f"one of {', '.join(SWEPT_DIALS)}, and its values: noise=0:1:5 is 0, 0.25, ... 1",
    )
    _add_out(sub)
    _add_sampling(sub)
    _add_server(sub)

    sub = command(
        "learn",
        actions.learn,
        "Learn the look of layers as words.",
        "A learned word stands before a layer's text (appearance: {word: NAME}) and carries its look over.",
    )
    _add_path(sub)
    sub.add_argument(
        "--layer",
        metavar="NAME",
        action="append",
        default=[],
        help="layer; may be repeated (default: each whose appearance says learn)",
    )
    sub.add_argument(
        "--vectors",
        metavar="N",
        type=_count,
        help="vectors of each word, 1 to 8: more hold more, and take as many tokens (default: 1)",
    )
    sub.add_argument("--model", default="", help="for which model (default: the server's)")
    _add_server(sub)

    _add_words(
        command(
            "words",
            actions.words,
            "List the learned words, or get, import, export or delete one.",
            "Alone it lists them. A word is a safetensors file that diffusers' load_textual_inversion reads.",
        )
    )
    _add_server(command("models", actions.models, "List the models, their limits and defaults."))
    sub = command("jobs", actions.jobs, "List the newest jobs.")
    sub.add_argument(
        "--limit", metavar="N", type=_count, default=20, help="how many (default: %(default)s)"
    )
    _add_server(sub)
    # Handled in `main`; listed here for the help.
    command("cluster", None, "Run the production shape as processes on this machine.")
    return parser


def _add_words(words: argparse.ArgumentParser) -> None:
    _add_server(words)
    commands = words.add_subparsers(metavar="COMMAND")

    def command(name: str, action: object, line: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=line, description=line)
        sub.set_defaults(action=action)
        return sub

    _add_server(command("list", actions.words, "List the learned words."), again=True)
    sub = command("get", actions.get_word, "Show one word.")
    sub.add_argument("name", metavar="WORD", help="as the list shows it: words/...")
    _add_server(sub, again=True)
    sub = command("export", actions.export_word, "Write a word's vectors as a safetensors file.")
    sub.add_argument("name", metavar="WORD", help="as the list shows it: words/...")
    sub.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write")
    _add_server(sub, again=True)
    sub = command("import", actions.import_word, "Take in a word learned elsewhere.")
    sub.add_argument(
        "file", metavar="FILE", type=Path, help="safetensors, as diffusers or A1111 write it"
    )
    sub.add_argument("--text", metavar="TEXT", required=True, help="the words it stands before")
    sub.add_argument("--model", default="", help="for which model (default: the server's)")
    _add_server(sub, again=True)
    sub = command("delete", actions.delete_word, "Forget a word.")
    sub.add_argument("name", metavar="WORD", help="as the list shows it: words/...")
    _add_server(sub, again=True)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a collage.yaml, or its folder")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder to write, made if absent"
    )


def _add_data(parser: argparse._ActionsContainer, *, again: bool = False) -> None:
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        default=argparse.SUPPRESS if again else Path("data"),
        help="where an embedded server keeps jobs and pictures (default: ./data)",
    )


def _add_server(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """`again`: the command above takes the same options, whose values count where they are not repeated."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="ADDR",
        default=argparse.SUPPRESS if again else "",
        help="host:port of a running server (default: one is started here)",
    )
    _add_data(parser, again=again)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
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
        type=_adapter,
        action="append",
        default=[],
        help="draw with this adapter (LoRA), its weight -2 to 2 (default: 1); may be repeated",
    )
    group.add_argument(
        "--model",
        metavar="M",
        default="",
        help="a served model's name; without --server also a model folder, hub id or models.yaml to serve",
    )
