"""Addresses with secrets in them: what refuses one is told, no part of it is printed. And who may read the metrics."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import traceback
from contextlib import asynccontextmanager

import pytest

from gateway.__main__ import Settings, open_jobs
from gateway.jobs import JobsUnavailable, QueuePolicy
from gateway.jobs.nats import NatsJobs
from local.processes import Process, free_port, nats_command
from services.common.settings import InvalidSetting
from services.common.telemetry import serve_metrics

USER, PASSWORD = "worker", "S3/cr#et?@"
QUOTED = "S3%2Fcr%23et%3F%40"
POLICY = QueuePolicy(exhausted=lambda *_: b"")


@pytest.mark.parametrize(
    "jobs",
    [
        "postgres://u:SECRET@host/db",
        "SECRET",
        "nats://u:SECRET@",
        "nats://u:SECRET@host:port",
        "nats://u:SECRET@host:99999",
        "nats://u:SEC/SECRET@host:4222",
        "nats://u:SEC#SECRET@host:4222",
        "nats://u:SEC?SECRET@host:4222",
        "nats://u:SECRET@[host",
        "tls://u:SECRET@",
        "sqlite:",
        "",
    ],
)
async def test_a_wrong_address_of_the_queue_tells_no_part_of_itself(jobs):
    with pytest.raises(InvalidSetting, match="COLLAGE_JOBS") as caught:
        await open_jobs(Settings(jobs=jobs))
    assert "SEC" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("COLLAGE_JOBS", "postgres://u:SECRET@host"),
        ("COLLAGE_JOBS", "nats://u:SE#SECRET@host:4222"),
        ("COLLAGE_BLOBS", "s3://KEYS:SE/SECRET@host:9000/bucket"),
    ],
)
def test_the_gateway_prints_no_secret(tmp_path, variable, value):
    environment = {**os.environ, "COLLAGE_BLOBS": f"folder:{tmp_path}", variable: value}
    command = [sys.executable, "-m", "gateway"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode
    assert f"{variable} is" in ended.stderr
    assert "SECRET" not in (ended.stdout + ended.stderr).replace("KEY:SECRET@HOST", "").replace(
        "KEY and SECRET", ""
    )


@asynccontextmanager
async def served(folder, settings: str):
    """The port of a NATS server with more settings."""
    port = free_port()
    command = nats_command(folder, port=port)
    with open(command[-1], "a") as file:  # noqa: ASYNC230 before anything is served
        file.write(settings)

    async def answers() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    process = Process("nats", command, log=folder / "nats.log")
    await process.start(answers)
    try:
        yield port
    finally:
        await process.terminate()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of localhost, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    key, found = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(found)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return found, key


async def refused(url: str) -> str:
    start = time.monotonic()
    with pytest.raises(InvalidSetting) as caught:
        await NatsJobs.open(url, POLICY, retry_s=30)
    assert time.monotonic() - start < 5
    told = str(caught.value)
    assert PASSWORD not in told and QUOTED not in told and "wrong" not in told
    return told


async def test_a_refused_password_is_told_at_once(tmp_path):
    settings = f'authorization {{ user: "{USER}", password: "{PASSWORD}" }}\n'
    async with served(tmp_path, settings) as port:
        jobs = await NatsJobs.open(f"nats://{USER}:{QUOTED}@127.0.0.1:{port}", POLICY)
        assert await jobs.counts()
        await jobs.close()
        for secret in (f"{USER}:wrong@", "wrong@", ""):
            told = await refused(f"nats://{secret}127.0.0.1:{port}")
            assert "refuses the user and password" in told
        # A password never goes out in the clear where the address says tls.
        told = await refused(f"tls://{USER}:{QUOTED}@127.0.0.1:{port}")
        assert "offers no TLS" in told


async def test_a_token_is_a_user_without_a_password(tmp_path):
    async with served(tmp_path, f'authorization {{ token: "{PASSWORD}" }}\n') as port:
        await (await NatsJobs.open(f"nats://{QUOTED}@127.0.0.1:{port}", POLICY)).close()


async def test_tls_is_taken_with_a_certificate_that_is_trusted(tmp_path, monkeypatch, certificate):
    found, key = certificate
    settings = f'tls {{ cert_file: "{found}", key_file: "{key}" }}\n'
    async with served(tmp_path, settings) as port:
        monkeypatch.setenv("SSL_CERT_FILE", str(found))
        for scheme in ("tls", "nats"):
            await (await open_jobs(Settings(jobs=f"{scheme}://localhost:{port}"))).close()
        monkeypatch.delenv("SSL_CERT_FILE")
        assert "TLS with the NATS server fails" in await refused(f"tls://localhost:{port}")


async def test_nobody_at_the_address_is_unavailable():
    with pytest.raises(JobsUnavailable, match="nobody answers"):
        await NatsJobs.open(f"nats://127.0.0.1:{free_port()}", POLICY, retry_s=1)


@pytest.mark.parametrize(
    ("address", "host"),
    [("127.0.0.1:50051", "127.0.0.1"), ("unix:/x/y", "127.0.0.1"), ("0.0.0.0:1", "0.0.0.0")],
)
def test_metrics_are_read_where_the_service_is(address, host):
    port = free_port()
    serve_metrics(port, address)
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    # Another address of this machine, which a wildcard would serve too.
    with socket.socket() as other:
        is_free = other.connect_ex(("127.0.0.2", port)) != 0
    assert is_free == (host == "127.0.0.1")
