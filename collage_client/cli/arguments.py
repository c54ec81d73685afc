"""The arguments of `collage`: commands, help texts. Each command's `action` is what it does."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from collage_client._collage import DIALS
from collage_client.cli import completion, conversion, drawing, listing, server, studio
from collage_client.cli.options import (
    COLLAGE,
    SWEPT_DIALS,
    add_allow,
    add_data,
    add_door,
    add_out,
    add_output,
    add_path,
    add_sampling,
    add_served,
    add_server,
    add_size,
    count,
    dial,
    place,
    port,
)

# Where a version stands: the client's own distribution, or the one of servers and client together.
_DISTRIBUTIONS = ("collage-client", "collage-diffusion")

_INTRODUCTION = """\
Turns a stack of cut-out pictures into one coherent picture (Collage Diffusion).

A collage is a file, collage.yaml: a canvas, a prompt, and layers from back to front, each with its picture, its
words, its place and its dials, all 0 to 1:
{dials}
A dial that is left out is chosen from the layer's size; `collage plan` shows the value.
"""
_START = """\
to begin:
  collage plan examples/bento --out out/plan          what would be drawn, and draw nothing
  collage generate examples/bento --out out/bento     draw it
  collage redo out/bento --layer rice --out out/two   draw one layer again, keep every other pixel
  collage sweep examples/bento --layer rice --dial noise=0:1:5 --out out/sweep

every command takes --json and --quiet; `collage completion bash|zsh|fish` completes them.
exit codes: 0 done, 1 failed, 2 bad input (the field is named), 130 interrupted
"""

Action = Callable[[argparse.Namespace], Awaitable[int | None]]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="collage",
        description=_INTRODUCTION.format(
            dials="\n".join(f"  {name:<8} {told}" for name, told in DIALS.items())
        ),
        epilog=_START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"collage {version()}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    _add_drawing(commands)
    _add_listing(commands)
    _add_serving(commands)

    async def complete(args: argparse.Namespace) -> None:
        print(completion.script(args.shell, root), end="")

    sub = _command(
        commands,
        "completion",
        complete,
        "Print a script that completes this command in a shell.",
        'eval "$(collage completion bash)"; the same for zsh; collage completion fish | source',
    )
    sub.add_argument("shell", choices=completion.SHELLS)
    return root


def version() -> str:
    """Of what is installed; "unknown" where it runs from a folder alone."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _command(
    commands: Any, name: str, action: Action, line: str, more: str = "", *, again: bool = False
) -> argparse.ArgumentParser:
    """Adds one; `again` where the command above takes the same options."""
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description=f"{line}\n\n{more}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(action=action)
    add_output(sub, again=again)
    return sub


def _add_drawing(commands: Any) -> None:
    sub = _command(
        commands,
        "generate",
        drawing.generate,
        "Draw a collage.",
        "Writes image-0.png and so on, composite.png, masks/, sheet.png (all of them side by side),\n"
        "collage.yaml with its pictures, and result.json: every seed and every dial as used. Of an earlier\n"
        "result in the folder it deletes the files that .collage.json lists, and nothing else.",
    )
    add_path(sub)
    _add_skip(sub)
    add_out(sub)
    add_sampling(sub)
    add_server(sub)

    sub = _command(
        commands,
        "plan",
        drawing.plan,
        "Show what would be drawn, without drawing it.",
        "Resolves every dial, draws composite and masks, warns of hidden layers and lost words, estimates\n"
        "the cost. Runs no model.",
    )
    add_path(sub)
    add_out(sub)
    add_sampling(sub)
    add_server(sub)

    sub = _command(
        commands,
        "cutout",
        drawing.cut_out,
        "Cut the object out of a photograph.",
        "Writes a PNG that a layer takes as its picture: transparent around the object, whose edge keeps none of\n"
        "the ground's colour.",
    )
    sub.add_argument("photo", metavar="PHOTO", type=Path, help="PNG, JPEG or WebP")
    sub.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="file to write (default: PHOTO's name with -cutout.png)",
    )
    sub.add_argument(
        "--model",
        metavar="NAME",
        dest="cutout_model",
        default="",
        help="one of the server's cut-out models (default: the first that fits)",
    )
    for name, places in (("--point", "on the object"), ("--not-point", "on what is not meant")):
        sub.add_argument(
            name,
            metavar="X,Y",
            dest=f"{name[2:].replace('-', '_')}s",
            type=place,
            action="append",
            default=[],
            help=f"a place {places}, in fractions of width and height (0.5,0.5 is the middle); may stand again",
        )
    add_server(sub)

    sub = _command(
        commands,
        "redo",
        drawing.redo,
        "Draw layers of an earlier result again.",
        "Every pixel outside the layers' masks stays byte for byte. The new folder can be redone in turn.\n"
        "Sampling that is left out is as before, but for the seed, which is a new one, and one picture.",
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
    sub.add_argument(
        "--feather",
        metavar="PX",
        type=float,
        help="width of the mask's soft inner edge in pixels, 0 to 64 (default: 4)",
    )
    sub.add_argument(
        "--restore-cutout",
        action=argparse.BooleanOptionalAction,
        help="start from the layer's own cut-out rather than from the picture (default: no)",
    )
    _add_skip(sub)
    add_out(sub)
    add_sampling(sub)
    add_server(sub)

    sub = _command(
        commands,
        "sweep",
        drawing.sweep,
        "Draw a collage once for each value of one dial, all with one seed.",
        "Writes a results folder for each value and one labelled contact sheet, sheet.png.",
    )
    add_path(sub)
    sub.add_argument("--layer", metavar="NAME", required=True, help="the layer whose dial moves")
    sub.add_argument(
        "--dial",
        metavar="NAME=FIRST:LAST:COUNT",
        type=dial,
        required=True,
        help=f"one of {', '.join(SWEPT_DIALS)}, and its values: noise=0:1:5 is 0, 0.25, ... 1",
    )
    add_out(sub)
    add_sampling(sub)
    add_server(sub)

    sub = _command(
        commands,
        "learn",
        drawing.learn,
        "Learn the look of layers as words.",
        "A learned word stands before a layer's text (appearance: {word: NAME}) and carries its look over.",
    )
    add_path(sub)
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
        type=count,
        help="vectors of each word, 1 to 8: more hold more, and take as many tokens (default: 1)",
    )
    sub.add_argument("--model", default="", help="for which model (default: the server's)")
    add_server(sub)

    sub = _command(
        commands,
        "convert",
        conversion.convert,
        "Make a file for other tools of a collage, or a collage of such a file.",
        "OpenRaster (.ora: Krita, GIMP, MyPaint) and a .zip hold all of a collage, and read back exactly; PSD\n"
        "holds its pixels. Of a results folder the picture becomes the top layer. docs/files.md tells more.",
    )
    sub.add_argument("path", metavar="FROM", type=Path, help=COLLAGE)
    add_allow(sub)
    add_size(sub)
    sub.add_argument(
        "out", metavar="TO", type=Path, help="an .ora, .psd or .zip file, or a folder, to write"
    )
    sub.add_argument(
        "--image",
        metavar="K",
        type=int,
        help="which picture of a results folder is the top layer (default: 0)",
    )
    sub.add_argument("--force", action="store_true", help="write over a file that exists")


def _add_listing(commands: Any) -> None:
    words = _command(
        commands,
        "words",
        listing.words,
        "List the learned words, or get, import, export or delete one.",
        "Alone it lists them. A word is a safetensors file that diffusers' load_textual_inversion reads.",
    )
    add_server(words)
    inner = words.add_subparsers(metavar="COMMAND")

    def word(
        name: str, action: Action, line: str, argument: str = "WORD"
    ) -> argparse.ArgumentParser:
        sub = _command(inner, name, action, line, again=True)
        if argument == "WORD":
            sub.add_argument("name", metavar="WORD", help="as the list shows it: words/...")
        add_server(sub, again=True)
        return sub

    word("list", listing.words, "List the learned words.", "")
    word("get", listing.get_word, "Show one word.")
    sub = word("export", listing.export_word, "Write a word's vectors as a safetensors file.")
    sub.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write")
    sub = word("import", listing.import_word, "Take in a word learned elsewhere.", "")
    sub.add_argument(
        "file", metavar="FILE", type=Path, help="safetensors, as diffusers or A1111 write it"
    )
    sub.add_argument("--text", metavar="TEXT", required=True, help="the words it stands before")
    sub.add_argument("--model", default="", help="for which model (default: the server's)")
    word("delete", listing.delete_word, "Forget a word.")

    sub = _command(
        commands, "models", listing.models, "List the models, their limits and defaults."
    )
    add_server(sub)
    sub = _command(commands, "jobs", listing.jobs, "List the newest jobs.")
    sub.add_argument(
        "--limit", metavar="N", type=count, default=20, help="how many (default: %(default)s)"
    )
    add_server(sub)

    inner = commands.add_parser(
        "job", help="Show, watch, fetch or cancel one job.", description="One job, by its name."
    ).add_subparsers(metavar="COMMAND", required=True)
    for name, action, line in (
        ("show", listing.show_job, "Show a job as it stands."),
        ("watch", listing.watch_job, "Follow a job to its end; with --json an event a line."),
        ("fetch", listing.fetch_job, "Write what a job drew into a folder, when it has ended."),
        ("cancel", listing.cancel_job, "Stop a job."),
    ):
        sub = _command(inner, name, action, line)
        sub.add_argument("name", metavar="JOB", help="as `collage jobs` shows it")
        if name == "fetch":
            add_out(sub)
        add_server(sub)


def _add_serving(commands: Any) -> None:
    sub = _command(
        commands, "serve", server.serve, "Run all services in this process until Ctrl-C."
    )
    sub.add_argument(
        "--address",
        metavar="ADDR",
        default="127.0.0.1:50051",
        help="host:port (default: %(default)s)",
    )
    add_door(sub, default=None)
    add_served(sub)
    add_data(sub)
    sub.set_defaults(server="")

    sub = _command(
        commands,
        "studio",
        studio.studio,
        "Open the page on which collages are made, until Ctrl-C.",
        "Uses the server of the data folder, or starts it. What is made is kept by the browser, under the\n"
        "page's address.",
    )
    sub.add_argument("path", metavar="PATH", type=Path, nargs="?", help=f"{COLLAGE}, to open")
    add_allow(sub)
    sub.add_argument("--no-open", action="store_true", help="do not open a browser")
    add_door(sub, default="127.0.0.1:8080")
    add_served(sub)
    add_server(sub)

    sub = _command(
        commands,
        "cluster",
        server.cluster,
        "Run the production shape as processes on this machine, until Ctrl-C.",
        "NATS, SeaweedFS, the three services and as many gateways as wanted; with --http the door, and Envoy before\n"
        "it where it is installed. A second Ctrl-C waits for nobody.",
    )
    sub.add_argument(
        "--gateways", metavar="N", type=count, default=2, help="how many (default: %(default)s)"
    )
    sub.add_argument(
        "--generators", metavar="N", type=count, default=1, help="how many (default: %(default)s)"
    )
    sub.add_argument(
        "--port",
        metavar="P",
        type=port,
        default=50051,
        help="of the first gateway, the others following (default: %(default)s); 0 for free ones",
    )
    add_door(sub, default=None)
    sub.add_argument(
        "--stages",
        choices=("torch", "triton"),
        default="torch",
        help="who runs the networks: the generator, or NVIDIA Triton servers (default: %(default)s)",
    )
    sub.add_argument(
        "--servers", metavar="N", type=count, default=1, help="of Triton (default: %(default)s)"
    )
    add_served(sub)
    add_data(sub)
    sub.set_defaults(data=Path("data/cluster"), server="")

    inner = commands.add_parser(
        "server",
        help="Tell of, or end, the server that a command left.",
        description="A command without --server leaves its server for the next one; it ends by itself after\n"
        "10 idle minutes (COLLAGE_IDLE_S, in seconds).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(metavar="COMMAND", required=True)
    for name, action, line in (
        ("status", server.status, "Tell of the server that lives in a data folder."),
        ("stop", server.stop, "End the server that lives in a data folder."),
    ):
        sub = _command(inner, name, action, line)
        add_data(sub)


def _add_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-failed-words",
        action="store_true",
        help="draw a layer whose word cannot be learned without it (default: fail)",
    )
