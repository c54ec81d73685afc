"""Envoy in front of a system on this machine: the configuration of production, with this system's places put in.

Main function: `configure`. What Envoy does stands in `deploy/envoy/envoy.yaml` alone. In Kubernetes
`python -m local.edge FILE ...` writes it when a pod starts.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from door.contract import descriptor_set

PRODUCTION = Path(__file__).parents[1] / "deploy" / "envoy" / "envoy.yaml"
PROBE_S = 5.0


def configure(
    file: Path,
    *,
    address: str,
    gateways: Sequence[str],
    door: str,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
) -> tuple[str, ...]:
    """Writes the configuration, and returns Envoy's arguments.

    Args:
        file: to write.
        address: host:port to listen on.
        gateways: their host:port.
        door: host:port of our door's process.
        hosts: names to answer to, beside this machine's own and the address'.
        origins: of pages elsewhere that are let in.
    """
    settings: Any = yaml.safe_load(PRODUCTION.read_text())
    (listener,) = settings["static_resources"]["listeners"]
    listener["address"] = _place(address)
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {each["name"]: each["typed_config"] for each in manager["http_filters"]}
    transcoder = filters["envoy.filters.http.grpc_json_transcoder"]
    del transcoder["proto_descriptor"]
    transcoder["proto_descriptor_bin"] = base64.b64encode(descriptor_set()).decode()
    named = manager["route_config"]["virtual_hosts"][0]
    port = address.rpartition(":")[2]
    answered = dict.fromkeys([*named["domains"], *names(address), *hosts])
    named["domains"] = list(answered)
    own = [f"{scheme}://{name}:{port}" for scheme in ("http", "https") for name in answered]
    own += [f"https://{name}" for name in answered]
    cors = named["typed_per_filter_config"]["envoy.filters.http.cors"]
    cors["allow_origin_string_match"] = [{"exact": each} for each in origins]
    policies = filters["envoy.filters.http.rbac"]["rules"]["policies"]
    policies["named"]["principals"] = [
        {"header": {"name": "origin", "string_match": {"exact": each, "ignore_case": True}}}
        for each in (*own, *origins)
    ]
    ends = {"gateway": gateways, "door": [door]}
    for cluster in settings["static_resources"]["clusters"]:
        (group,) = cluster["load_assignment"]["endpoints"]
        group["lb_endpoints"] = [
            {"endpoint": {"address": _place(each)}} for each in ends[cluster["name"]]
        ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1))
    return ("-c", str(file), "--use-dynamic-base-id", "--log-level", "warning")


def names(address: str) -> tuple[str, ...]:
    """The host name of an address that is listened on; none where that is every one."""
    host = address.rpartition(":")[0]
    return () if host in ("0.0.0.0", "[::]") else (host,)


def check(address: str) -> None:
    """Returns when a door answers a call, raises while it does not; blocks."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=PROBE_S)
    try:
        path = "/collage.v1.CollageService/ListJobs"
        head = {"content-type": "application/json", "host": f"localhost:{port}"}
        connection.request("POST", path, b"{}", head)
        status = connection.getresponse().status
    finally:
        connection.close()
    if status != 200:
        raise ConnectionError(f"{address} answers {status}")


def _place(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def main() -> None:
    """Writes the configuration of an Envoy that somebody else starts."""
    parser = argparse.ArgumentParser(prog="python -m local.edge", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="to listen on")
    parser.add_argument("--gateway", required=True, metavar="HOST:PORT[,HOST:PORT...]")
    parser.add_argument("--door", required=True, metavar="HOST:PORT", help="our door's process")
    parser.add_argument("--host-name", action="append", default=[], help="to answer to, too")
    parser.add_argument("--origin", action="append", default=[], help="of a page that is let in")
    told = parser.parse_args()
    configure(
        told.file,
        address=told.address,
        gateways=told.gateway.split(","),
        door=told.door,
        hosts=told.host_name,
        origins=told.origin,
    )


if __name__ == "__main__":
    main()
