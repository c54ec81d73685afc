"""Settings: one frozen dataclass a process, each field a variable of the environment, all of them in this one place.

A field `blobs` of any of these classes is read from `COLLAGE_BLOBS`, and so on; the field's default counts when the
variable is not set. One environment may serve every process of a system, so each knows the variables of all: one that
none of them has is a mistake, and stops the process. `docs/operations.md` shows `table()`. This is the only module of
the services that looks at the environment.
"""

import asyncio
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from services.common.blobs import BlobStore, BlobStoreUnavailable, FolderBlobStore

PREFIX = "COLLAGE_"

Settings = TypeVar("Settings")

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
# Of a value that is refused, what is shown.
_SHOWN = 60


class Form(Enum):
    """What a text has to look like: in words, and as an expression whose group `port` is a number."""

    TEXT = ("text", r"(?P<port>).*")
    # The host may be of any form that gRPC takes.
    ADDRESS = ("`HOST:PORT` or `unix:PATH`", r"(?:.+:(?P<port>[0-9]{1,5})|unix:.+)")
    # Of several gRPC takes numbers alone: a name stands for all its addresses.
    ADDRESSES = (
        "`HOST:PORT`, `IPV4:PORT,IPV4:PORT...` or `unix:PATH`",
        r"(?:[^,]+:(?P<port>[0-9]{1,5})|[0-9.]+:[0-9]{1,5}(?:,[0-9.]+:[0-9]{1,5})+|unix:.+)",
    )
    PORT = ("`HOST:PORT`", r".+:(?P<port>[0-9]{1,5})")
    URL = (
        "`http://HOST:PORT` or `https://HOST:PORT`",
        r"(?:https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?)?",
    )


class InvalidSetting(Exception):
    """A variable that no process has, or a value its field cannot take."""


def _setting(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    most: float | None = None,
    among: Sequence[str] = (),
    form: Form = Form.TEXT,
) -> Any:
    """A field with its range (both ends allowed), as `read` checks it and `table` shows it."""
    limits = {"least": least, "most": most, "among": among, "form": form}
    return field(default=default, metadata={"meaning": meaning, **limits})


_BLOBS = "`folder:PATH`, or `s3://KEY:SECRET@HOST:PORT/BUCKET` (`s3s://` for TLS; `/` in KEY and SECRET is `%2F`)"
_MODELS = (
    "a model's folder, `hub:OWNER/NAME@REVISION`, `NAME=SOURCE,NAME=SOURCE`, the default first, or the path of a "
    "models.yaml; empty: the bundled model"
)
_THREADS = "CPU threads of one operation, 0: one a core; another number gives other last bits"
_MODEL_MEMORY = (
    "GiB that weights may take on each device, 0: no limit; what was used least recently gives way"
)
_MAX_WORK_S = (
    "seconds that a generator may be at work on one request, and learning on its words; waiting is none of it. What "
    "is expected to take longer, from what was measured, is refused; what turns out to is ended"
)
_METRICS_PORT = "Prometheus port, 0: none; `collage cluster` counts on from it, a port for each of our processes"
_LOG_LEVEL = "least severe of what is logged"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_SEVERAL = "; several, or a name of several, are asked by turns"
_LISTEN = "where to listen, `HOST:PORT` or `unix:PATH`"
# A month.
_MOST_WORK_S = 30 * 24 * 3600
# More than any machine has, and less than what a library chokes on.
_MANY = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """`python -m gateway`."""

    address: str = _setting("127.0.0.1:50051", _LISTEN, form=Form.ADDRESS)
    compositor: str = _setting(
        "127.0.0.1:50052", f"where the compositor is{_SEVERAL}", form=Form.ADDRESSES
    )
    inversion: str = _setting(
        "127.0.0.1:50053", f"where the inversion service is{_SEVERAL}", form=Form.ADDRESSES
    )
    generator: str = _setting(
        "127.0.0.1:50054", f"where the generator is{_SEVERAL}", form=Form.ADDRESSES
    )
    blobs: str = _setting("folder:data/blobs", _BLOBS)
    public_blobs: str = _setting(
        "",
        "where callers reach the S3 server of COLLAGE_BLOBS; pictures then carry an address, good for an hour and for "
        "whoever holds it; empty: none, they are downloaded by GetBlob",
        form=Form.URL,
    )
    jobs: str = _setting(
        "sqlite:data/jobs.sqlite",
        "`sqlite:PATH`, `nats://USER:PASSWORD@HOST:PORT`, or `tls://` for nothing but TLS",
    )
    job_replicas: int = _setting(
        1,
        "NATS servers that keep each job, where this start creates the queue; one that is there stays as it is",
        least=1,
        most=5,
    )
    slots: int = _setting(
        4,
        "jobs it works on at a time; more only helps while generators are not busy",
        least=1,
        most=_MANY,
    )
    max_queued: int = _setting(
        1000, "jobs that may wait before new ones are refused", least=1, most=10**6
    )
    lease_s: float = _setting(
        10.0,
        "seconds after which the job of a gateway that fell silent is given to another",
        least=1,
        most=3600,
    )
    metrics_port: int = _setting(0, _METRICS_PORT, least=0, most=65535)
    log_level: str = _setting("INFO", _LOG_LEVEL, among=_LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositorSettings:
    """`python -m services.compositor`."""

    address: str = _setting("127.0.0.1:50052", _LISTEN, form=Form.ADDRESS)
    blobs: str = _setting("folder:data/blobs", _BLOBS)
    # Of anything but a models.yaml it reads nothing.
    models: str = _setting("", _MODELS)
    threads: int = _setting(0, _THREADS, least=0, most=_MANY)
    metrics_port: int = _setting(0, _METRICS_PORT, least=0, most=65535)
    log_level: str = _setting("INFO", _LOG_LEVEL, among=_LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class InversionSettings:
    """`python -m services.inversion`."""

    address: str = _setting("127.0.0.1:50053", _LISTEN, form=Form.ADDRESS)
    blobs: str = _setting("folder:data/blobs", _BLOBS)
    models: str = _setting("", _MODELS)
    threads: int = _setting(0, _THREADS, least=0, most=_MANY)
    word_steps: int = _setting(
        200,
        "training steps of a word at most; part of what names a word: another number learns every word anew",
        least=1,
        most=10**6,
    )
    joint_rows: int = _setting(
        0,
        "rows trained together at most, four a word; words beyond that are learned after them; 0: as many as make 1.2 "
        "million pixels; another number gives other last bits",
        least=0,
        most=_MANY,
    )
    max_waiting: int = _setting(32, "calls that may wait for their turn", least=1, most=10**6)
    max_work_s: float = _setting(3600.0, _MAX_WORK_S, least=1, most=_MOST_WORK_S)
    checkpoint_s: float = _setting(
        3.0, "seconds between two checkpoints: what a crash may cost", least=0, most=3600
    )
    model_memory: float = _setting(0.0, _MODEL_MEMORY, least=0, most=10**6)
    metrics_port: int = _setting(0, _METRICS_PORT, least=0, most=65535)
    log_level: str = _setting("INFO", _LOG_LEVEL, among=_LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorSettings:
    """`python -m services.generator`."""

    address: str = _setting("127.0.0.1:50054", _LISTEN, form=Form.ADDRESS)
    blobs: str = _setting("folder:data/blobs", _BLOBS)
    models: str = _setting("", _MODELS)
    stages: str = _setting(
        "torch",
        "who runs the networks: torch, in this process; or triton:HOST:PORT[,HOST:PORT...], NVIDIA Triton servers, a "
        "name standing for all its addresses",
    )
    max_rows: int = _setting(
        1,
        "U-Net rows that jobs, and the pictures of one, may share; 1: no picture's bytes depend on the load",
        least=1,
        most=_MANY,
    )
    max_waiting: int = _setting(32, "calls that may wait for their turn", least=1, most=10**6)
    max_work_s: float = _setting(3600.0, _MAX_WORK_S, least=1, most=_MOST_WORK_S)
    threads: int = _setting(0, _THREADS, least=0, most=_MANY)
    request_memory: float = _setting(
        0.0,
        "GiB that one request may take beyond the weights, 0: half of what they leave of the device's memory; one "
        "that would take more is refused before anything is drawn",
        least=0,
        most=10**6,
    )
    model_memory: float = _setting(0.0, _MODEL_MEMORY, least=0, most=10**6)
    metrics_port: int = _setting(0, _METRICS_PORT, least=0, most=65535)
    log_level: str = _setting("INFO", _LOG_LEVEL, among=_LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSettings:
    """`python -m door`."""

    address: str = _setting("127.0.0.1:50055", "where to listen, `HOST:PORT`", form=Form.ADDRESS)
    gateway: str = _setting(
        "127.0.0.1:50051", f"where the gateway is{_SEVERAL}", form=Form.ADDRESSES
    )
    http_hosts: str = _setting(
        "",
        "host names that are answered to beside this machine's own and that of COLLAGE_ADDRESS, with commas between",
    )
    http_origins: str = _setting(
        "", "origins of pages elsewhere that are let in, `https://HOST`, with commas between"
    )
    log_level: str = _setting("INFO", _LOG_LEVEL, among=_LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSettings:
    """The command `collage`, where it starts a server."""

    reuse: bool = _setting(True, "whether a command leaves its server for the next one")
    idle_s: float = _setting(
        600.0,
        "seconds without a command after which such a server ends",
        least=0,
        most=10**9,
    )
    log_level: str = _setting(
        "",
        "the same, of a server that a command starts; empty: INFO for `collage serve`, WARNING or ERROR for the others",
        among=("", *_LEVELS),
    )


PARTS: Mapping[str, type] = {
    "gateway": GatewaySettings,
    "compositor": CompositorSettings,
    "inversion": InversionSettings,
    "generator": GeneratorSettings,
    "door": DoorSettings,
    "collage": CommandSettings,
}


def variable(name: str) -> str:
    """What the field `name` is read from."""
    return PREFIX + name.upper()


def ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that say they are of this system, those that no process has among them."""
    return {name: value for name, value in environment.items() if name.upper().startswith(PREFIX)}


def read(
    kind: type[Settings],
    environment: Mapping[str, str] | None = None,
    **own: Any,
) -> Settings:
    """An instance of the dataclass `kind`, filled from the environment.

    Args:
        kind: one of `PARTS`.
        environment: for tests; the process' own when None.
        own: fields that count over the environment's.

    Raises:
        InvalidSetting: naming every variable that no process has, with the most similar one, or else every one of
            `kind` whose value is not allowed, with what is.
    """
    source = os.environ if environment is None else environment
    _check_names(ours(source))
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for each in fields(kind):  # type: ignore[arg-type]
        name = variable(each.name)
        if name in source and each.name not in own:
            try:
                values[each.name] = _parse(source[name], each)
            except ValueError as error:
                wrong.append(f"{name} is {source[name][:_SHOWN]!r}; allowed: {error}")
    if wrong:
        raise InvalidSetting("; ".join(wrong))
    return kind(**values, **own)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A process from its start to its end: a sentence instead of a traceback, and exit status 2, for a wrong setting.

    1 for storage or an address that cannot be used.
    """
    try:
        asyncio.run(main())
    except (BlobStoreUnavailable, OSError) as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(1) from None
    except InvalidSetting as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


def table() -> str:
    """Every variable as a row of Markdown: name, processes, what it takes, default, meaning."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for part, kind in PARTS.items():
        for each in fields(kind):
            default = str(each.default).removesuffix(".0").replace("True", "true")
            default = f"`{default}`" if default else "empty"
            row = (variable(each.name), _allowed(each), default, each.metadata["meaning"])
            rows.setdefault(row, []).append(part)
    lines = ["| variable | of | allowed | default | meaning |", "|---|---|---|---|---|"]
    for (name, allowed, default, meaning), parts in sorted(rows.items(), key=lambda row: row[0][0]):
        services = set(parts) - {"door"}
        of = "all four" if services == {*PARTS} - {"collage", "door"} else ", ".join(parts)
        of += ", door" if of == "all four" and "door" in parts else ""
        lines.append(f"| `{name}` | {of} | {allowed} | {default} | {meaning} |")
    return "\n".join(lines)


def _check_names(found: Mapping[str, str]) -> None:
    known = sorted({variable(each.name) for kind in PARTS.values() for each in fields(kind)})
    wrong = []
    for name in sorted(set(found) - set(known)):
        (nearest,) = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)
        wrong.append(f"{name[:_SHOWN]} is no setting of any process; the nearest is {nearest}")
    if wrong:
        raise InvalidSetting("; ".join(wrong))


def _parse(text: str, each: Field[Any]) -> Any:
    """The value a field takes; raises ValueError that says what is allowed."""
    limits = each.metadata
    wrong = ValueError(_allowed(each).replace("`", ""))
    if each.type is bool:
        truth = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        if truth is None:
            raise wrong
        return truth
    if each.type is str:
        found = re.fullmatch(limits["form"].value[1], text, re.ASCII | re.DOTALL)
        is_right = found is not None and int(found["port"] or 0) <= 65535
        if not is_right or (limits["among"] and text not in limits["among"]):
            raise wrong
        return text
    if each.type is int:
        if not _INTEGER.fullmatch(text):
            raise wrong
        number: float = int(text)
    else:
        try:
            number = float(text) if "_" not in text else math.nan
        except ValueError:
            raise wrong from None
    if not limits["least"] <= number <= limits["most"]:
        raise wrong
    return number


def _allowed(each: Field[Any]) -> str:
    """What a field takes, in words."""
    limits = each.metadata
    if each.type is bool:
        return "true, false, 1 or 0"
    if limits["among"]:
        return ", ".join(among for among in limits["among"] if among)
    if each.type is str:
        words: str = limits["form"].value[0]
        return words
    kind = "a whole number" if each.type is int else "a number"
    return f"{kind} from {limits['least']} to {limits['most']}"


async def open_blobs(address: str, *, public: str = "") -> BlobStore:
    """The blob store at an address.

    Args:
        address: `folder:PATH`, or `s3://KEY:SECRET@HOST:PORT/BUCKET` (`s3s://` for TLS).
        public: `http://HOST:PORT` or `https://HOST:PORT`, where callers reach the same S3 server; empty: nowhere.

    Raises:
        InvalidSetting: for any other form.
    """
    # A path is a path: # and ? are characters of it.
    scheme, _, path = address.partition(":")
    if scheme == "folder" and path:
        if public:
            raise InvalidSetting(
                "COLLAGE_PUBLIC_BLOBS is of an S3 server, COLLAGE_BLOBS is a folder: callers download by GetBlob"
            )
        return FolderBlobStore(Path(path))
    wrong = InvalidSetting(
        "COLLAGE_BLOBS is neither folder:PATH nor s3://KEY:SECRET@HOST:PORT/BUCKET; in KEY and SECRET "
        "what separates is written in percents, / as %2F"
    )
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        # What is wrong with it may be in the secret: it is not told, nor where it was raised.
        raise wrong from None
    bucket = parts.path.strip("/")
    if parts.scheme in ("s3", "s3s") and parts.hostname and parts.username and bucket:
        protocol, standard_port = ("https", 443) if parts.scheme == "s3s" else ("http", 80)
        # The S3 client is imported only by processes that use it.
        from services.common.s3 import S3BlobStore

        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        try:
            return await S3BlobStore.open(
                f"{protocol}://{host}:{port or standard_port}",
                access_key=unquote(parts.username),
                secret_key=unquote(parts.password or ""),
                bucket=bucket,
                public_url=public,
            )
        except ValueError as error:
            # A bucket's name, an address: neither holds a secret.
            raise InvalidSetting(f"COLLAGE_BLOBS: {error}") from None
    raise wrong
