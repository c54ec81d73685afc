"""A connection to a NATS server by its address, with what refuses it told in words.

Main function: `connect`. An address may hold a secret: no message here repeats any part of one. This module knows no
jobs.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import nats.aio.client
import nats.errors

from gateway.jobs.errors import JobsUnavailable
from services.common.settings import InvalidSetting
from services.common.telemetry import log

_FORM = "nats://HOST:PORT or tls://HOST:PORT, before HOST a USER:PASSWORD@ or TOKEN@ with / # ? @ in percents"


class _NoTls(nats.errors.Error):  # type: ignore[misc]
    """The address says tls, the server does not."""


class _OnlyTls(nats.aio.client.Client):  # type: ignore[misc]
    """Sends nothing, a password above all, before the line is encrypted: the client alone lets the server choose."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and not info.get("tls_required"):
            raise _NoTls
        await super()._process_info(info, initial_connection)


async def connect(
    url: str, *, retry_s: float, on_reconnect: Callable[[], None]
) -> nats.aio.client.Client:
    """A connection that comes back by itself, once there is one.

    Args:
        url: `nats://` takes TLS where the server asks for it, `tls://` nothing else.
        retry_s: how long a server that is away is waited for.
        on_reconnect: called when a lost connection is back.

    Raises:
        InvalidSetting: no such address can be, or the server refuses user, password or certificate.
        JobsUnavailable: nobody answers.
    """
    address, secrets, is_tls = _parse(url)
    client = _OnlyTls() if is_tls else nats.aio.client.Client()
    told: set[str] = set()
    refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_error(error: Exception) -> None:
        refusal = _refusal(error)
        # The client tells of every failed try to connect again.
        if not refusal or refusal in told:
            log.debug("nats error", error=type(error).__name__)
            return
        told.add(refusal)
        log.error("nats refuses the connection", reason=refusal)
        if not refused.done():
            refused.set_result(refusal)

    async def on_disconnect() -> None:
        if not client.is_closed:
            log.warning("nats connection lost")

    async def on_reconnected() -> None:
        log.warning("nats connected again")
        told.clear()
        on_reconnect()

    connecting = asyncio.create_task(
        client.connect(
            address,
            **secrets,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnected,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.2,
            connect_timeout=2,
            ping_interval=10,
        )
    )
    try:
        await asyncio.wait(
            {connecting, refused}, timeout=retry_s, return_when=asyncio.FIRST_COMPLETED
        )
        if connecting.done():
            connecting.result()
            return client
        if refused.done():
            raise InvalidSetting(f"COLLAGE_JOBS: {refused.result()}")
        raise JobsUnavailable("nats: no connection (nobody answers)")
    except (OSError, nats.errors.Error) as error:
        raise JobsUnavailable(f"nats: no connection ({type(error).__name__})") from error
    finally:
        if not client.is_connected:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await client.close()


def _parse(url: str) -> tuple[str, dict[str, str], bool]:
    """The address without its secrets, these, and whether it says tls."""
    try:
        parts = urlsplit(url)
        port = parts.port or 4222
        is_right = parts.scheme in ("nats", "tls") and bool(parts.hostname)
        # A / # or ? within the password ends it before HOST.
        is_right = is_right and not (parts.path.strip("/") or parts.query or parts.fragment)
    except ValueError:
        is_right = False
    if not is_right:
        # Without the error: it quotes what may be a part of the password.
        raise InvalidSetting(f"COLLAGE_JOBS is not of the form {_FORM}") from None
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    user, password = unquote(parts.username or ""), parts.password
    secrets = {"token": user} if user else {}
    if password is not None:
        secrets = {"user": user, "password": unquote(password)}
    return f"{parts.scheme}://{host}:{port}", secrets, parts.scheme == "tls"


def _refusal(error: Exception) -> str:
    """Why a server that answers is no use; "" where it may be by the next try."""
    if isinstance(error, _NoTls):
        return "the address says tls://, the NATS server offers no TLS"
    if isinstance(error, ssl.SSLError):
        return (
            f"TLS with the NATS server fails: {error.reason or type(error).__name__}; "
            "SSL_CERT_FILE names the certificates that are trusted"
        )
    if "authorization violation" in str(error).lower():
        return "the NATS server refuses the user and password of the address (or that it has none)"
    return ""
