"""Variables of the environment: none is misspelt in silence, none is dropped, all are told of in one place."""

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from local import embedded
from local.layout import lay_out
from local.processes import free_port
from local.residence import program
from local.variables import settings
from services.common.settings import (
    PARTS,
    CommandSettings,
    GatewaySettings,
    GeneratorSettings,
    InvalidSetting,
    InversionSettings,
    open_blobs,
    read,
    table,
    variable,
)
from services.generator.scheduler import Scheduler
from services.inversion.learn import Recipe
from testing import toy

ROOT = Path(__file__).parents[1]
EVERY = sorted({variable(each.name) for kind in PARTS.values() for each in fields(kind)})
# Each of them right, so that one environment may serve every process.
WHOLE = {
    "COLLAGE_ADDRESS": "127.0.0.1:0",
    "COLLAGE_COMPOSITOR": "unix:/x",
    "COLLAGE_GATEWAY": "gateway.example:50051",
    "COLLAGE_INVERSION": "[::1]:1",
    "COLLAGE_GENERATOR": "dns:///generator:50054",
    "COLLAGE_PUBLIC_BLOBS": "https://pictures.example",
    "COLLAGE_REUSE": "0",
    "COLLAGE_LOG_LEVEL": "DEBUG",
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    for name in EVERY:
        monkeypatch.delenv(name, raising=False)


def test_every_process_takes_an_environment_that_is_right_for_all():
    environment = {**dict.fromkeys(EVERY, "2"), **WHOLE, "PATH": "x", "COLLAGEN": "y"}
    for kind in PARTS.values():
        found = read(kind, environment)
        assert all(getattr(found, each.name) != each.default for each in fields(kind))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("COLLAGE_MAXROWS", "COLLAGE_MAX_ROWS"),
        ("COLLAGE_MODEL_MEM", "COLLAGE_MODEL_MEMORY"),
        ("COLLAGE_IDLE", "COLLAGE_IDLE_S"),
        ("COLLAGE_BLOB", "COLLAGE_BLOBS"),
        ("COLLAGE_LOGLEVEL", "COLLAGE_LOG_LEVEL"),
        ("collage_slots", "COLLAGE_SLOTS"),
        ("COLLAGE_", "COLLAGE_"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_nearest(part, wrong, nearest):
    with pytest.raises(InvalidSetting, match=f"^{wrong} is no setting .*nearest is {nearest}"):
        read(PARTS[part], {wrong: "SECRET", "COLLAGE_SLOTS": "2"})


def test_all_that_is_misspelt_is_told_at_once_and_no_value():
    with pytest.raises(InvalidSetting) as caught:
        read(GatewaySettings, {"COLLAGE_SLOT": "SECRET", "COLLAGE_JOB": "SECRET"})
    assert "COLLAGE_SLOT " in str(caught.value) and "COLLAGE_JOB " in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (GeneratorSettings, "max_rows", ["0", "-1", "1025", "nan", "1.5", "", " 1", "1_0", "٣"]),
        (GeneratorSettings, "max_rows", ["9" * 5000, "0x10", "1e3"]),
        (GeneratorSettings, "model_memory", ["inf", "-1", "nan", "-inf", "20G", "", "1_0"]),
        (GeneratorSettings, "request_memory", ["infinity", "-0.1", "1e999"]),
        (GeneratorSettings, "threads", ["-1", "100000"]),
        (GatewaySettings, "slots", ["0", "-4"]),
        (GatewaySettings, "lease_s", ["0", "inf", "nan", "-10"]),
        (GatewaySettings, "metrics_port", ["-1", "65536", "http"]),
        (GatewaySettings, "max_queued", ["0"]),
        (GatewaySettings, "log_level", ["info", "LOUD", ""]),
        (GatewaySettings, "address", ["", "localhost", "127.0.0.1:99999", ":50051", "unix:"]),
        (GatewaySettings, "generator", ["http://generator", "generator"]),
        (GatewaySettings, "public_blobs", ["pictures.example", "http://", "https://u:p@host"]),
        (GatewaySettings, "public_blobs", ["http://host:99999", "http://host/path", "s3://host"]),
        (InversionSettings, "word_steps", ["0", "-200"]),
        (InversionSettings, "checkpoint_s", ["nan", "-1"]),
        (CommandSettings, "reuse", ["yes", "2", ""]),
        (CommandSettings, "idle_s", ["nan", "-1", "inf", "10 minutes"]),
    ],
)
def test_a_value_that_cannot_be_is_told_with_what_is_allowed(kind, name, values):
    for value in values:
        with pytest.raises(InvalidSetting) as caught:
            read(kind, {variable(name): value})
        assert str(caught.value).startswith(f"{variable(name)} is {value[:60]!r}; allowed: ")
        assert len(str(caught.value)) < 300


def test_all_values_that_cannot_be_are_told_at_once():
    with pytest.raises(InvalidSetting, match=r"COLLAGE_SLOTS is '0'.*COLLAGE_LEASE_S is 'nan'"):
        read(GatewaySettings, {"COLLAGE_SLOTS": "0", "COLLAGE_LEASE_S": "nan"})


@pytest.mark.parametrize(
    "module", ["gateway", "services.compositor", "services.inversion", "services.generator"]
)
def test_a_process_ends_with_a_sentence_and_no_traceback(tmp_path, module):
    environment = {**os.environ, "COLLAGE_MAX_ROW": "4", "COLLAGE_BLOBS": f"folder:{tmp_path}"}
    command = [sys.executable, "-m", module]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "COLLAGE_MAX_ROW is no setting of any process; the nearest is COLLAGE_MAX_ROWS"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["COLLAGE_ADDRESS", "COLLAGE_METRICS_PORT"])
def test_an_address_in_use_ends_a_process_with_a_sentence(tmp_path, name):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = {"COLLAGE_ADDRESS": "127.0.0.1:0", "COLLAGE_BLOBS": f"folder:{tmp_path}"}
        told[name] = f"127.0.0.1:{port}" if name == "COLLAGE_ADDRESS" else f"{port}"
        ended = subprocess.run(
            [sys.executable, "-m", "services.compositor"],
            env={**os.environ, **told},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


async def test_a_bucket_that_cannot_be_is_told():
    with pytest.raises(InvalidSetting, match=r"COLLAGE_BLOBS: .*bucket"):
        await open_blobs("s3://KEY:SECRET@127.0.0.1:9/x")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("COLLAGE_MAX_ROW", "4", "COLLAGE_MAX_ROWS"),
        ("COLLAGE_MAX_ROWS", "0", "a whole number from 1"),
        ("COLLAGE_MODELS", "weights", "--model"),
        ("COLLAGE_ADDRESS", "127.0.0.1:1", "--address"),
        ("COLLAGE_BLOBS", "folder:x", "--data"),
        ("COLLAGE_GENERATOR", "127.0.0.1:1", "its own parts"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "serve", "cluster"])
def test_the_command_refuses_what_it_would_drop(tmp_path, command, name, value, told):
    words = {"plan": ["plan", str(ROOT / "examples" / "bento"), "--out", str(tmp_path / "out")]}
    words = [*words.get(command, [command]), "--data", str(tmp_path / "data")]
    ended = subprocess.run(
        [sys.executable, "-m", "collage_client.cli", *words],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert f"{name} is" in ended.stderr and told in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_system_in_one_process_keeps_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLAGE_MODEL_MEMORY", "0.000001")
    with pytest.raises(InvalidSetting, match="COLLAGE_MODEL_MEMORY is 1e-06"):
        await embedded.start(tmp_path / "data", threads=1)


async def test_a_system_in_one_process_answers_scrapes_where_it_is_told(tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv("COLLAGE_METRICS_PORT", str(port))
    model = str(toy.mini(tmp_path / "model"))
    server = await embedded.start(tmp_path / "data", model=model, threads=1)
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        with pytest.raises(
            OSError, match=f"COLLAGE_METRICS_PORT: cannot listen on .*:{port}: Addr"
        ):
            await embedded.start(tmp_path / "other", model=model, threads=1)
    finally:
        await server.stop()


def test_each_part_of_a_cluster_is_told_what_is_meant_for_it(tmp_path, monkeypatch):
    meant = {
        "COLLAGE_MODEL_MEMORY": "20",
        "COLLAGE_REQUEST_MEMORY": "4",
        "COLLAGE_MAX_ROWS": "8",
        "COLLAGE_JOINT_ROWS": "16",
        "COLLAGE_SLOTS": "2",
        "COLLAGE_THREADS": "3",
        "COLLAGE_METRICS_PORT": "30000",
        "COLLAGE_LOG_LEVEL": "DEBUG",
    }
    for name, value in meant.items():
        monkeypatch.setenv(name, value)
    layout = lay_out(
        tmp_path, gateways=2, port=0, models="m", threads=0, servers=0, generators=1, inherited=()
    )
    parts = {part.name: part.process for stage in layout.stages for part in stage}
    found = {
        name: read(PARTS[name.partition("-")[0]], process._environment)
        for name, process in parts.items()
        if name.partition("-")[0] in PARTS
    }
    assert found["generator"].max_rows == 8 and found["generator"].request_memory == 4
    assert found["inversion"].joint_rows == 16 and found["gateway-2"].slots == 2
    for name in ("generator", "inversion"):
        assert (found[name].model_memory, found[name].threads) == (20, 3)
        assert found[name].models == "m"
    ports = [found[name].metrics_port for name in parts if name in found]
    assert ports == [30000, 30001, 30002, 30003, 30004]
    assert {each.log_level for each in found.values()} == {"DEBUG"}
    monkeypatch.setenv("COLLAGE_METRICS_PORT", "65532")
    with pytest.raises(
        InvalidSetting, match="COLLAGE_METRICS_PORT is 65532; allowed: at most 65531"
    ):
        lay_out(
            tmp_path,
            gateways=2,
            port=0,
            models="m",
            threads=0,
            servers=0,
            generators=1,
            inherited=(),
        )


def test_a_server_of_other_variables_is_another_one(monkeypatch):
    before = program()
    monkeypatch.setenv("COLLAGE_IDLE_S", "5")
    assert program() == before
    monkeypatch.setenv("COLLAGE_MAX_ROWS", "2")
    assert program() != before


def test_an_option_counts_over_its_variable(monkeypatch):
    monkeypatch.setenv("COLLAGE_THREADS", "4")
    assert settings(GeneratorSettings).threads == 4
    assert settings(GeneratorSettings, threads=2).threads == 2


def test_the_defaults_are_those_of_the_parts():
    scheduler = Scheduler()
    assert GeneratorSettings().max_rows == scheduler.max_rows
    assert InversionSettings().word_steps == Recipe().steps


def test_the_page_of_settings_is_made_from_them():
    page = (ROOT / "docs" / "operations.md").read_text()
    assert table() in page, "print services.common.settings.table() into the page"
    assert all(f"`{name}`" in page for name in EVERY)
