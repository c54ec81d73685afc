"""Where the server is: the one that is named, or one started here; and the commands that run one.

Nothing of the servers is imported before it is needed: a machine that calls a server has none of them installed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from collage_client import AsyncCollageClient, CollageError, InvalidInput

_ANY_PORT = "127.0.0.1:0"
# Seconds between two looks at whether a server is there.
_LOOK_S = 1.0


@asynccontextmanager
async def connected(
    args: argparse.Namespace, *, draws: bool = False
) -> AsyncIterator[AsyncCollageClient]:
    """A client of the named server, of the one at hand in the data folder, or of one started here.

    Whoever `draws` needs a server of the model that --model names; others take any that is at hand.
    """
    async with reached(args, draws=draws) as address, AsyncCollageClient(address) as client:
        yield client


@asynccontextmanager
async def reached(
    args: argparse.Namespace, *, draws: bool, takes_up: bool = False
) -> AsyncIterator[str]:
    """The address of the server that `connected` calls.

    `takes_up`: whether one that is started for later commands too goes on with the jobs that an earlier one left.
    """
    if args.server:
        yield args.server
        return
    async with AsyncExitStack() as stack:
        background = _local()
        try:
            settings = background.settings(background.CommandSettings)
            if settings.reuse and not args.no_reuse:
                address = await stack.enter_async_context(
                    background.reach(
                        args.data,
                        _model(args) if draws else None,
                        idle_s=settings.idle_s,
                        tell=args.output.note,
                        takes_up=takes_up,
                    )
                )
            else:
                own = _own(args, background, kind="call", address=_ANY_PORT, level="ERROR")
                address = (await stack.enter_async_context(own)).address
        except background.InvalidSetting as error:
            raise InvalidInput.in_field("", str(error), reason="SETTING") from error
        except background.StartFailed as error:
            if error.is_setting:
                raise InvalidInput.in_field("", str(error), reason="SETTING") from error
            raise CollageError(str(error), code=grpc.StatusCode.UNAVAILABLE) from error
        yield address


def served_model(args: argparse.Namespace) -> str:
    """What --model says as the name of a served model; "" where it says what is to be served here."""
    return "" if _model(args) else getattr(args, "model", "")


async def serve(args: argparse.Namespace) -> None:
    """Runs all services in this process until it is told to stop, or one of them has failed."""
    ended = interrupted()
    background = _local()
    try:
        async with AsyncExitStack() as stack:
            own = await stack.enter_async_context(
                _own(args, background, kind="serve", address=args.address, level="INFO")
            )
            told = {"address": own.address, "data": str(args.data)}
            if args.http:
                told["http"] = await stack.enter_async_context(door(args, own.address))
            beside = f" and {told['http']}/" if args.http else ""
            args.output.tell(
                f"collage service on {own.address}{beside}, data in {args.data}; Ctrl-C stops it",
                told,
            )
            ends = [asyncio.create_task(ended.wait()), asyncio.create_task(own.failed())]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()
            args.output.note("stopping")
    except background.InvalidSetting as error:
        raise InvalidInput.in_field("", str(error), reason="SETTING") from error
    if not ended.is_set():
        raise CollageError(
            "a service has failed; its log is above", code=grpc.StatusCode.UNAVAILABLE
        )


def door(
    args: argparse.Namespace,
    gateway: str,
    start: Callable[[], dict[str, Any] | None] = lambda: None,
) -> AbstractAsyncContextManager[str]:
    """The HTTP door to a gateway, at --http; `start` as in `door.application`."""
    try:
        enter()
        from door.origins import InvalidOrigin
        from door.server import serving
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error

    @asynccontextmanager
    async def opened() -> AsyncIterator[str]:
        try:
            opening = serving(
                args.http,
                gateway=gateway,
                hosts=args.host_name,
                origins=args.origin,
                start=start,
            )
            async with opening as url:
                yield url
        except InvalidOrigin as error:
            raise InvalidInput.in_field("", str(error), reason="SETTING") from error

    return opened()


async def lost(args: argparse.Namespace) -> None:
    """Returns when the server that `reached` found in the data folder is gone; never for one that is named."""
    residence = None if args.server else _residence(args)
    found = residence.resident() if residence else None
    if residence is None or found is None:
        await asyncio.Event().wait()
        return
    # Another process' end is no event of the loop.
    while residence.resident() == found:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)


def interrupted() -> asyncio.Event:
    """Set by the first Ctrl-C or SIGTERM from now on."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    return ended


async def cluster(args: argparse.Namespace) -> int:
    """Runs the production shape as processes on this machine."""
    try:
        enter()
        from local import cluster as processes
        from local.layout import Web
        from local.served import models_setting
        from services.common.settings import InvalidSetting
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    running = processes.Cluster(
        args.data,
        gateways=args.gateways,
        port=args.port,
        models=models_setting(args.model),
        threads=args.threads,
        http=args.http
        and Web(address=args.http, hosts=tuple(args.host_name), origins=tuple(args.origin)),
        servers=args.servers if args.stages == "triton" else 0,
        generators=args.generators,
        tell=args.output.note,
    )
    try:
        return await processes.serve(running, tell=args.output.note)
    except InvalidSetting as error:
        raise InvalidInput.in_field("", str(error), reason="SETTING") from error


async def status(args: argparse.Namespace) -> None:
    """Tells of the server that lives in the data folder."""
    residence = _residence(args)
    found = residence.resident() if residence else None
    if residence is None or found is None:
        state = "starting or ending" if residence and residence.is_occupied() else "none"
        args.output.tell(f"server in {args.data}: {state}", {"state": state})
        return
    is_current = found.serves(found.model)
    rows = {
        "state": "in use" if residence.is_used() else "idle",
        "kind": found.kind,
        "pid": found.pid,
        "address": found.address,
        "model": found.model,
        "is_current": is_current,
        "idle_s": round(residence.idle_s(), 1),
        "log": str(residence.log),
    }
    shown = {
        **rows,
        "model": found.model or "bundled",
        "is_current": "yes" if is_current else "no: code, files or variables have changed",
    }
    lines = [f"server in {args.data}", *(f"  {name:<10} {value}" for name, value in shown.items())]
    args.output.tell("\n".join(lines), rows)


async def stop(args: argparse.Namespace) -> None:
    """Ends the server that lives in the data folder, whoever uses it."""
    residence = _residence(args)
    found = residence.resident() if residence else None
    if residence and found:
        await residence.stop(found)
    elif residence and residence.is_occupied():
        raise CollageError(
            f"a server is starting or ending in {args.data}; try again",
            code=grpc.StatusCode.UNAVAILABLE,
        )
    pid = found.pid if found else None
    args.output.tell(f"ended {pid}" if pid else f"no server in {args.data}", {"ended": pid})


def _residence(args: argparse.Namespace) -> Any:
    """What the data folder says of its server; None where none was ever there, and nothing is made."""
    background = _local()
    return background.Residence(args.data) if background.Residence.exists(args.data) else None


def _model(args: argparse.Namespace) -> str:
    """The folder, models.yaml or hub:... that --model names for a server here to load; "" where it is a served name."""
    model: str = getattr(args, "model", "")
    is_source = "/" in model or model.startswith("hub:") or (model and Path(model).exists())
    return model if not args.server and is_source else ""


def _own(
    args: argparse.Namespace, background: Any, *, kind: str, address: str, level: str
) -> AbstractAsyncContextManager[Any]:
    """A server in this process."""
    server: AbstractAsyncContextManager[Any] = background.own(
        args.data,
        _model(args),
        kind=kind,
        address=address,
        threads=getattr(args, "threads", 0),
        level=level,
        tell=args.output.note,
    )
    return server


def _local() -> Any:
    """What starts and finds servers on this machine."""
    try:
        enter()
        from local import background
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    return background


def enter() -> None:
    """Makes the servers' rooms importable where they are installed from a wheel; in the tree they are already."""
    try:
        import collage_diffusion
    except ModuleNotFoundError:
        return
    collage_diffusion.enter()


def _not_installed(error: ModuleNotFoundError) -> CollageError:
    return CollageError(
        f"no server can run here, {error.name} is not installed: name a server with --server, or install "
        "collage-diffusion[embedded]",
        code=grpc.StatusCode.UNAVAILABLE,
        reason="NOT_INSTALLED",
    )
