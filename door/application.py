"""The routes: calls, blobs, the page, and what it begins with. Main function: `application`."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from door import blobs, calls, files, status
from door.exchange import Load
from door.origins import Guard
from interchange.asking import Interchange
from services.common.errors import NotFound

# Where the built page lies, in a checkout and in a wheel.
PAGE = Path(__file__).parents[1] / "studio" / "dist"
# The page asks this origin alone, and runs nothing that does not lie in its own folder.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; font-src 'self'; "
    "connect-src 'self' blob:; worker-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def application(
    channel: grpc.aio.Channel,
    *,
    bound: str,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    start: Callable[[], dict[str, Any] | None] = lambda: None,
    interchange: Interchange | None = None,
    page: Path = PAGE,
) -> ASGIApp:
    """The door to the gateway at the other end of a channel.

    Args:
        channel: see `services.common.rpc.connect`, with `passes_on`.
        bound: see `Guard`, as `hosts` and `origins`.
        hosts: see there.
        origins: see there.
        start: what the page opens, as `GET /start` tells it: `{"collage": ...}`; None for nothing.
        interchange: opens and writes files of other tools; none are where it is None.
        page: folder of the built page; "/" answers NOT_FOUND where there is none.

    Raises:
        InvalidOrigin: see `Guard`.
    """
    load = Load()

    async def started(_: Request) -> Response:
        found = start()
        if found is None:
            raise HTTPException(404)
        return Response(
            json.dumps(found), media_type="application/json", headers={"cache-control": "no-store"}
        )

    routes: list[BaseRoute] = [
        Route(calls.PATH + "{method:path}", calls.Calls(channel, load)),
        Route(blobs.PATH + "{sha256:path}", blobs.Blobs(channel, load)),
        Route("/start", started),
    ]
    if interchange is not None:
        # What files hold keeps no call out.
        opened = files.Files(channel, Load(), interchange)
        routes.append(Route(files.PATH + "{what:path}", opened))
    if page.is_dir():
        routes.append(Mount("/", _Page(directory=page, html=True)))
    guarded = Starlette(routes=routes, exception_handlers={HTTPException: _told})
    return Guard(guarded, bound=bound, hosts=hosts, origins=origins)


class _Page(StaticFiles):
    """The built page: its assets are named by their content and kept for good."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        kept = "public, max-age=31536000, immutable" if path.startswith("assets/") else "no-cache"
        response.headers["cache-control"] = kept
        response.headers["content-security-policy"] = _PAGE_POLICY
        response.headers["cross-origin-opener-policy"] = "same-origin"
        return response


async def _told(request: Request, error: Exception) -> Response:
    """What there is not, in the same form as every other error."""
    assert isinstance(error, HTTPException)
    known = (
        "POST /collage.v1.CollageService/METHOD, GET and PUT /blobs/SHA256, POST /files/open and "
        "/files/save, and the page at /"
    )
    told = NotFound(
        f"{request.method} of this path is not answered here; there are {known}", reason="NO_PATH"
    )
    return Response(
        status.rendered(told.to_status()),
        error.status_code,
        dict(error.headers or {}),
        "application/json",
    )
