"""Where the server is: the one that is named, or one started here; and the commands that run one.

Nothing of the servers is imported before it is needed: a machine that calls a server has none of them installed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from collage_client import AsyncCollageClient, CollageError, InvalidInput


@asynccontextmanager
async def connected(args: argparse.Namespace) -> AsyncIterator[AsyncCollageClient]:
    """A client of the named server, or of one started here for the call."""
    if args.server:
        async with AsyncCollageClient(args.server) as client:
            yield client
        return
    args.output.note(
        f"starting an embedded server, data in {args.data} (--server ADDR uses a running one)"
    )
    server = await _embedded(args, "127.0.0.1:0", log_level="ERROR")
    try:
        async with AsyncCollageClient(server.address) as client:
            yield client
    finally:
        await server.stop()


def served_model(args: argparse.Namespace) -> str:
    """What --model says as the name of a served model; "" where it says what is to be served here."""
    return "" if _is_served_here(args) else getattr(args, "model", "")


async def serve(args: argparse.Namespace) -> None:
    """Runs all services in this process until it is told to stop, or one of them has failed."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    args.output.note("starting (the model is loaded and tried once)")
    server = await _embedded(args, args.address, log_level="INFO")
    try:
        args.output.tell(
            f"collage service on {server.address}, data in {args.data}; Ctrl-C stops it",
            {"address": server.address, "data": str(args.data)},
        )
        ends = [asyncio.create_task(ended.wait()), asyncio.create_task(server.failed())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        args.output.note("stopping")
    finally:
        await server.stop()
    if not ended.is_set():
        raise CollageError(
            "a service has failed; its log is above", code=grpc.StatusCode.UNAVAILABLE
        )


async def cluster(args: argparse.Namespace) -> int:
    """Runs the production shape as processes on this machine."""
    try:
        from local import cluster as processes
        from local.served import models_setting
    except ModuleNotFoundError as error:
        raise _not_installed("cluster", error) from error
    running = processes.Cluster(
        args.data,
        gateways=args.gateways,
        port=args.port,
        models=models_setting(args.model),
        threads=args.threads,
        tell=args.output.note,
    )
    return await processes.serve(running, tell=args.output.note)


def _is_served_here(args: argparse.Namespace) -> bool:
    """Does --model name a folder, models.yaml or hub id for an embedded server to load, rather than a served model?"""
    model = getattr(args, "model", "")
    return not args.server and bool(model) and ("/" in model or Path(model).exists())


async def _embedded(args: argparse.Namespace, address: str, *, log_level: str) -> Any:
    try:
        from local import embedded
        from services.common.settings import InvalidSetting
        from services.common.telemetry import start_logging
    except ModuleNotFoundError as error:
        raise _not_installed("embedded server", error) from error
    start_logging("embedded", level=log_level)
    model = args.model if _is_served_here(args) else ""
    try:
        return await embedded.start(
            args.data, address=address, model=model, threads=getattr(args, "threads", 0)
        )
    except InvalidSetting as error:
        raise InvalidInput.in_field("", str(error), reason="SETTING") from error


def _not_installed(what: str, error: ModuleNotFoundError) -> CollageError:
    return CollageError(
        f"no {what} here, {error.name} is not installed; name a server with --server",
        code=grpc.StatusCode.UNAVAILABLE,
        reason="NOT_INSTALLED",
    )
