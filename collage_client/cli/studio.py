"""`collage studio`: the page, on the server of the data folder, in the browser."""

from __future__ import annotations

import argparse
import asyncio
import webbrowser
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from google.protobuf import json_format

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient, files
from collage_client.cli import conversion, server


async def studio(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C, from a new server where the one at hand ends."""
    collage = await conversion.collage(args) if args.path else None
    ended: asyncio.Event | None = None
    while ended is None or not ended.is_set():
        async with AsyncExitStack() as stack:
            # The page waits for its jobs, whatever becomes of a server.
            reached = server.reached(args, draws=True, takes_up=True)
            address = await stack.enter_async_context(reached)
            found = await _started(address, collage) if collage is not None else None
            url = await stack.enter_async_context(server.door(args, address, lambda: found))  # noqa: B023 of this round
            if ended is None:
                ended = server.interrupted()
                await _open(args, url, f"{url}/?open=start" if found else f"{url}/")
                # A browser keeps what was made under this very address.
                args.http = urlsplit(url).netloc
            ends = [asyncio.create_task(ended.wait()), asyncio.create_task(server.lost(args))]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()
            args.output.note("stopping" if ended.is_set() else "the server has ended; another one")


async def _open(args: argparse.Namespace, url: str, page: str) -> None:
    """Tells where the page is, and has the browser show it."""
    args.output.tell(
        f"studio on {page}, data in {args.data}; Ctrl-C stops it",
        {"http": url, "page": page, "data": str(args.data)},
    )
    if not args.no_open and not await asyncio.to_thread(webbrowser.open, page):
        args.output.note("no browser could be opened here; open the address yourself")


async def _started(address: str, collage: collage_pb2.Collage) -> dict[str, Any]:
    """What the page begins with, its pictures stored."""
    async with AsyncCollageClient(address) as client:
        await _upload(client, collage)
    return {"collage": json_format.MessageToDict(collage)}


async def _upload(client: AsyncCollageClient, collage: collage_pb2.Collage) -> None:
    """Stores the pictures of a collage and names them by their digests, in place."""
    for _, image in files.pictures(collage):
        if image.WhichOneof("source") == "data":
            image.blob.CopyFrom(await client.put(image.data))
