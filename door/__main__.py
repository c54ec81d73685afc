"""The door's process: `python -m door`, behind Envoy or by itself in front of a gateway."""

import asyncio
import signal
import socket

from door.origins import InvalidOrigin
from door.server import serving
from services.common.settings import DoorSettings as Settings
from services.common.settings import InvalidSetting, read, run, variable
from services.common.telemetry import log, start_logging


async def main() -> None:
    """Serves until SIGTERM."""
    settings = read(Settings)
    start_logging(f"door@{socket.gethostname()}", level=settings.log_level)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        async with serving(
            settings.address,
            gateway=settings.gateway,
            hosts=_names(settings.http_hosts),
            origins=_names(settings.http_origins),
        ) as url:
            log.info("listening", name="door", address=url)
            await ended.wait()
    except InvalidOrigin as error:
        names = f"{variable('http_hosts')} and {variable('http_origins')}"
        raise InvalidSetting(f"{names}: {error}") from None


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


if __name__ == "__main__":
    run(main)
