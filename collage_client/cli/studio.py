"""`collage studio`: the page, on the server of the data folder, in the browser."""

from __future__ import annotations

import argparse
import asyncio
import webbrowser
from contextlib import AsyncExitStack
from typing import Any

from google.protobuf import json_format

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient, files
from collage_client.cli import conversion, server


async def studio(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    collage = await conversion.collage(args) if args.path else None
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(server.reached(args, draws=True))
        found: dict[str, Any] | None = None
        if collage is not None:
            async with AsyncCollageClient(address) as client:
                await _upload(client, collage)
            found = {"collage": json_format.MessageToDict(collage)}
        url = await stack.enter_async_context(server.door(args, address, lambda: found))
        page = f"{url}/?open=start" if found else f"{url}/"
        ended = server.interrupted()
        args.output.tell(
            f"studio on {page}, data in {args.data}; Ctrl-C stops it",
            {"http": url, "page": page, "data": str(args.data)},
        )
        if not args.no_open and not await asyncio.to_thread(webbrowser.open, page):
            args.output.note("no browser could be opened here; open the address yourself")
        await ended.wait()
        args.output.note("stopping")


async def _upload(client: AsyncCollageClient, collage: collage_pb2.Collage) -> None:
    """Stores the pictures of a collage and names them by their digests, in place."""
    for _, image in files.pictures(collage):
        if image.WhichOneof("source") == "data":
            image.blob.CopyFrom(await client.put(image.data))
