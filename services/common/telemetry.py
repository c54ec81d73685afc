"""Logs and metrics: JSON lines with the request id on every one, and a Prometheus endpoint.

The request id travels between processes as gRPC metadata and inside one as a context variable; `services.common.rpc`
moves it across. This module knows no service.
"""

import logging
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

import structlog
from prometheus_client import start_http_server

request_id: ContextVar[str] = ContextVar("request_id", default="")


def start_logging(service: str, *, level: str = "INFO") -> None:
    """Sends one JSON line an event to stderr, with service name and request id. Called once, in `__main__`."""

    def add_context(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        if request := request_id.get():
            event["request_id"] = request
        return event

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            add_context,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


def serve_metrics(port: int, address: str) -> None:
    """Answers Prometheus scrapes; port 0 means none.

    Args:
        port: to listen on.
        address: where the service listens, host:port, and so who may ask: on loopback this machine, on a pod's own
            address whoever reaches the pod. Beside a unix socket it is loopback.

    Raises:
        OSError: somebody else listens there.
    """
    host = address.rpartition(":")[0].strip("[]")
    host = "127.0.0.1" if address.startswith("unix:") else host
    if port:
        try:
            start_http_server(port, host)
        except OSError as error:
            raise OSError(
                f"COLLAGE_METRICS_PORT: cannot listen on {host}:{port}: {error.strerror}"
            ) from error


log = structlog.get_logger()
