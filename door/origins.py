"""Who may come in by a browser: `Guard` looks at Host, Origin and Sec-Fetch-Site before anything else is read.

A page of any site can have a browser send requests here. Host tells of one that has given its own name this address,
Origin and Sec-Fetch-Site of one that calls across. By default this machine's own names are answered to, and only the
page that was served here is let in; the operator names others.
"""

import re
from collections.abc import Iterable

from google.rpc import code_pb2
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from door import status
from door.exchange import Exchange
from services.common.errors import CollageError, quote

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ANYWHERE = ("0.0.0.0", "[::]", "")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(?::([0-9]{1,5}))?", re.ASCII)
_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(?::([0-9]{1,5}))?", re.ASCII)
_PORTS = {"http": "80", "https": "443"}
_EXPOSED = "etag, content-range, grpc-status, grpc-message, grpc-status-details-bin"
_ASKED = (
    "authorization, content-type, grpc-timeout, if-none-match, if-range, last-event-id, range, x-grpc-web, "
    "x-request-id, x-user-agent"
)
# Seconds for which a browser may keep what it was told.
_KEPT_S = "600"


class NotAllowed(CollageError):
    """Who asks is not let in, and what its operator would have to say."""

    code = code_pb2.PERMISSION_DENIED


class InvalidOrigin(ValueError):
    """What the operator named is no host or no origin."""


class Guard:
    """The application, for those who may come in.

    Args:
        application: what is guarded.
        bound: the host that is listened on, as it was named.
        hosts: further names to answer to, without port.
        origins: of pages elsewhere that are let in, `https://HOST[:PORT]`.

    Raises:
        InvalidOrigin: one of them is none.
    """

    def __init__(
        self, application: ASGIApp, *, bound: str, hosts: Iterable[str], origins: Iterable[str]
    ) -> None:
        self._application = application
        self._hosts = {*LOOPBACK, *map(_host, hosts)}
        if bound not in _ANYWHERE:
            self._hosts.add(bound.lower())
        self._origins = set(map(_origin, origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One exchange, as ASGI has it."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "").lower()
        is_named = origin in self._origins

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                _secure(
                    MutableHeaders(scope=message), origin if is_named else "", bool(self._origins)
                )
            await send(message)

        try:
            self._check(scope, headers, is_named=is_named)
        except NotAllowed as error:
            await _refuse(Exchange(scope, receive, sent), error)
            return
        if scope["method"] == "OPTIONS":
            await _preflight(Exchange(scope, receive, sent), headers, is_named=is_named)
            return
        await self._application(scope, receive, sent)

    def _check(self, scope: Scope, headers: Headers, *, is_named: bool) -> None:
        hosts = headers.getlist("host")
        found = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if found is None or found[1].removesuffix(".") not in self._hosts:
            name = quote(hosts[0]) if hosts else "no name"
            raise NotAllowed(
                f"this server does not answer to {name}; its operator may name it with --host-name",
                reason="HOST_NOT_NAMED",
            )
        origins = headers.getlist("origin")
        if origins and not is_named:
            own = _ORIGIN.fullmatch(origins[0].lower()) if len(origins) == 1 else None
            is_own = own is not None and (own[2], own[3] or _PORTS[own[1]]) == (
                found[1],
                found[2] or _PORTS[own[1]],
            )
            if not is_own:
                raise NotAllowed(
                    f"pages of {quote(origins[0])} may not call this server; its operator may name them with --origin",
                    reason="ORIGIN_NOT_NAMED",
                )
        # Of pages elsewhere a browser says so, to an address of its own machine and to any by TLS.
        is_across = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if not origins and is_across and not _is_visit(scope, headers):
            raise NotAllowed(
                "pages of other origins may not load this; the operator may name them with --origin",
                reason="ORIGIN_NOT_NAMED",
            )


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Whether somebody follows a link to the page itself, which then stands alone."""
    is_page = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
    return (
        is_page
        and headers.get("sec-fetch-mode") == "navigate"
        and (headers.get("sec-fetch-dest", "document") == "document")
    )


def _secure(headers: MutableHeaders, origin: str, has_named: bool) -> None:
    """What every answer tells a browser."""
    headers.setdefault("x-content-type-options", "nosniff")
    headers.setdefault("referrer-policy", "no-referrer")
    headers.setdefault(
        "content-security-policy", "default-src 'none'; frame-ancestors 'none'; sandbox"
    )
    headers.setdefault("cross-origin-resource-policy", "cross-origin" if origin else "same-origin")
    if has_named:
        headers.add_vary_header("origin")
    if origin:
        headers["access-control-allow-origin"] = origin
        headers["access-control-expose-headers"] = _EXPOSED


async def _preflight(exchange: Exchange, headers: Headers, *, is_named: bool) -> None:
    """What a browser asks before it lets a page of another origin call."""
    allowed = [("allow", "GET, HEAD, POST, PUT")]
    if is_named:
        allowed += [
            ("access-control-allow-methods", "GET, HEAD, POST, PUT"),
            ("access-control-allow-headers", _ASKED),
            ("access-control-max-age", _KEPT_S),
        ]
        if headers.get("access-control-request-private-network") == "true":
            allowed.append(("access-control-allow-private-network", "true"))
    await exchange.begin(204, allowed)
    await exchange.end()


async def _refuse(exchange: Exchange, error: NotAllowed) -> None:
    code = 421 if error.reason == "HOST_NOT_NAMED" else 403
    body = status.rendered(error.to_status()).encode()
    await exchange.answer(code, body, "application/json")


def _host(name: str) -> str:
    found = _HOST.fullmatch(name.lower())
    if found is None or found[2]:
        raise InvalidOrigin(f"{name!r} is no host name; allowed: studio.example, without port")
    return found[1]


def _origin(name: str) -> str:
    found = _ORIGIN.fullmatch(name.lower())
    if found is None:
        raise InvalidOrigin(
            f"{name!r} is no origin; allowed: https://studio.example, with a port where it has one"
        )
    return name.lower()
