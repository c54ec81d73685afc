"""The door: one suite of plain `curl`, over each way that HTTP comes in by."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from google.protobuf import json_format
from PIL import Image

from collage.v1 import collage_service_pb2 as pb
from door import calls, exchange, server
from door.contract import descriptor_set
from door.server import serving
from local import edge, embedded
from local.processes import Process, free_port, program
from testing import system, toy
from testing.waiting import until

ROOT = Path(__file__).parents[1]
LIMIT_S = 60
SERVICE = "/collage.v1.CollageService/"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def reason(self):
        """The stable name of the error that is told."""
        (info,) = [each for each in self.json["details"] if each["@type"].endswith("ErrorInfo")]
        return info["reason"]


class Curl:
    """`curl` at one door."""

    def __init__(self, url, kind="embedded"):
        self.url, self.kind = url, kind

    def __call__(self, path, *options, data=None, head=False):
        command = ["curl", "-sS", "-m", str(LIMIT_S), *options]
        command += ["-I"] if head else ["-D", "-"]
        command += ["--data-binary", "@-"] if data is not None else []
        done = subprocess.run(
            [*command, self.url + path], input=data, capture_output=True, timeout=LIMIT_S + 5
        )
        assert done.returncode == 0, done.stderr
        return parsed(done.stdout)

    def call(self, method, message, *options):
        """A call in JSON, of a message or of what stands for one."""
        text = (
            message if isinstance(message, bytes) else json_format.MessageToJson(message).encode()
        )
        own = ("-H", "Content-Type: application/json")
        return self(SERVICE + method, *own, *options, data=text)

    def put(self, data, *options, digest=None, kind="image/png"):
        digest = digest or hashlib.sha256(data).hexdigest()
        own = ("-X", "PUT", "-H", f"Content-Type: {kind}")
        return self(f"/blobs/{digest}", *own, *options, data=data)


def parsed(raw):
    """The last answer in what curl printed; one that only says to go on comes before it."""
    while True:
        head, _, body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        if status != 100:
            pairs = (line.split(": ", 1) for line in lines[1:])
            return Answer(status, {name.lower(): value for name, value in pairs}, body)
        raw = body


@contextlib.contextmanager
def looping():
    """A loop in a thread; what `enter` opens there is closed at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stack = contextlib.AsyncExitStack()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(LIMIT_S)

    run.enter = lambda context: run(stack.enter_async_context(context))
    try:
        yield run
    finally:
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LIMIT_S)
        loop.close()


@pytest.fixture(scope="module")
def run():
    with looping() as run:
        yield run


@pytest.fixture(scope="module")
def gateway(run, tmp_path_factory):
    """The address of a whole system's gateway."""
    folder = tmp_path_factory.mktemp("door")

    @contextlib.asynccontextmanager
    async def started():
        model = str(toy.mini(folder / "toy"))
        server = await embedded.start(folder / "data", model=model, threads=1)
        try:
            yield server.address
        finally:
            await server.stop()

    return run.enter(started())


@contextlib.asynccontextmanager
async def envoy(folder, gateway, *, hosts=(), origins=()):
    """The address of a real Envoy with the configuration of production, our door behind it."""
    address = f"127.0.0.1:{free_port()}"
    # The door is asked for what Envoy was asked for, and checks the same names.
    async with serving("127.0.0.1:0", gateway=gateway, hosts=hosts, origins=origins) as door:
        arguments = edge.configure(
            folder / "envoy.json",
            address=address,
            gateways=[gateway],
            door=urlsplit(door).netloc,
            hosts=hosts,
            origins=origins,
        )
        process = Process("envoy", (program("envoy"), *arguments), log=folder / "envoy.log")
        await process.start(lambda: asyncio.to_thread(edge.check, address))
        try:
            yield f"http://{address}"
        finally:
            await process.terminate(grace_s=5)


@pytest.fixture(scope="module", params=["embedded", "envoy"])
def opened(request, run, gateway, tmp_path_factory):
    """Opens a door of one kind to the system, for the hosts and origins that are named."""

    def opened(**named):
        if request.param == "embedded":
            return Curl(run.enter(serving("127.0.0.1:0", gateway=gateway, **named)))
        return Curl(run.enter(envoy(tmp_path_factory.mktemp("envoy"), gateway, **named)), "envoy")

    return opened


@pytest.fixture(scope="module")
def curl(opened):
    return opened()


needs_connect = pytest.mark.skipif(
    not shutil.which("node") or not (ROOT / "studio/node_modules/@connectrpc").is_dir(),
    reason="no node here, or studio/node_modules is not installed (make studio)",
)


CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    os.environ.get("COLLAGE_TEST_CHROMIUM") != "required"
    and (not CHROMIUM or not (ROOT / "studio/node_modules/playwright-core").is_dir()),
    reason="no chromium here, or studio/node_modules is not installed (make studio)",
)


def node(script, *arguments):
    """What a script of this folder prints, as JSON."""
    done = subprocess.run(
        ["node", "--input-type=module", "-", *map(str, arguments)],
        input=(ROOT / "tests" / script).read_bytes(),
        # Where its imports are found.
        cwd=ROOT / "studio",
        capture_output=True,
        timeout=2 * LIMIT_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def events(answer):
    """The events of a stream: id, name and data of each."""
    found = []
    for block in answer.body.decode().split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")
        )
        if fields:
            found.append(
                (fields.get("id"), fields.get("event"), json.loads(fields["data"])["event"])
            )
    return found


def request(**more):
    sampling = {"steps": 3, "seed": 5}
    return pb.GenerateImagesRequest(
        request_id=str(uuid.uuid4()), collage=system.collage(), sampling=sampling, **more
    )


def test_a_plan_is_the_one_that_grpc_gives(run, curl, gateway):
    asked = pb.PlanCollageRequest(collage=system.collage(), sampling={"seed": 1})
    answer = curl.call("PlanCollage", asked)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")

    async def by_grpc():
        async with system.connect(gateway) as channel:
            stub = system.collage_service_pb2_grpc.CollageServiceStub(channel)
            return await stub.PlanCollage(asked)

    found = json_format.Parse(answer.body, pb.PlanCollageResponse())
    told = run(by_grpc())
    # What it has measured in between.
    for plan in (found.plan, told.plan):
        for name in ("estimated_seconds", "estimated_seconds_low", "estimated_seconds_high"):
            plan.ClearField(name)
    assert found == told


def test_an_error_has_its_details_and_the_http_status_of_its_code(curl):
    wrong = request()
    wrong.collage.layers[1].noise = 7
    answer = curl.call("PlanCollage", pb.PlanCollageRequest(collage=wrong.collage))
    assert answer.status == 400 and answer.reason == "INVALID_FIELD"
    (bad,) = [each for each in answer.json["details"] if each["@type"].endswith("BadRequest")]
    assert bad["fieldViolations"][0]["field"] == "collage.layers[1].noise"
    missing = curl.call("GetJob", b'{"name": "jobs/none"}')
    assert (missing.status, missing.reason) == (404, "JOB_NOT_FOUND")
    unknown = curl.call("Draw", b"{}")
    assert (unknown.status, unknown.json["code"]) == (501, 12)


def test_a_stream_is_events_that_can_be_taken_up_again(curl):
    asked = request()
    drawn = curl.call("GenerateImages", asked)
    assert (drawn.status, drawn.headers["content-type"]) == (200, "text/event-stream")
    log = [event for event in events(drawn) if "queued" not in event[2]]
    assert [int(place) for place, _, _ in log] == list(range(1, len(log) + 1))
    assert [int(told["sequence"]) for _, _, told in log] == list(range(1, len(log) + 1))
    assert "done" in log[-1][2]
    name = json.dumps({"name": log[0][2]["job"]}).encode()
    assert [
        event for event in events(curl.call("WatchJob", name)) if "queued" not in event[2]
    ] == log
    resumed = curl.call("WatchJob", name, "-H", "Last-Event-ID: 4")
    assert [event for event in events(resumed) if "queued" not in event[2]] == log[4:]
    again = curl.call("GenerateImages", asked, "-H", "Last-Event-ID: 4")
    assert [event for event in events(again) if "queued" not in event[2]] == log[4:]
    wrong = curl.call("WatchJob", name, "-H", "Last-Event-ID: four")
    assert wrong.status == 400 and wrong.json["message"].startswith("Last-Event-ID: ")
    (image,) = [told["image"] for _, _, told in log if "image" in told]
    picture = curl(f"/blobs/{image['blob']['sha256']}")
    assert picture.headers["content-type"] == "image/png"
    assert hashlib.sha256(picture.body).hexdigest() == image["blob"]["sha256"]


def test_a_stream_that_cannot_begin_is_an_answer_with_its_status(curl):
    answer = curl.call("WatchJob", b'{"name": "jobs/none"}')
    assert (answer.status, answer.headers["content-type"]) == (404, "application/json")


def test_json_that_is_no_message_is_refused_in_words(curl):
    for body in (b"{", b"[]", b"\xff", b"[" * 2000):
        answer = curl.call("GetJob", body)
        assert answer.status == 400 and answer.reason == "INVALID_FIELD", body
    other = curl(SERVICE + "GetJob", "-H", "Content-Type: text/plain", data=b"{}")
    assert other.status == 415
    assert curl(SERVICE + "GetJob").status == 405


def test_a_field_that_there_is_not_is_refused(curl):
    if curl.kind == "envoy":
        pytest.xfail("Envoy's transcoder drops what it does not know, as docs/http.md says")
    answer = curl.call("GetJob", b'{"nme": 1}')
    assert (answer.status, answer.reason) == (400, "INVALID_FIELD")


def test_a_blob_is_stored_and_read_whole_or_in_part(curl):
    data = system.cutout(71, side=64)
    digest = hashlib.sha256(data).hexdigest()
    stored = curl.put(data)
    assert stored.status == 200
    assert stored.json["blob"] == {
        "sha256": digest,
        "sizeBytes": str(len(data)),
        "mediaType": "image/png",
    }
    whole = curl(f"/blobs/{digest}")
    assert (whole.status, whole.body) == (200, data)
    assert whole.headers["content-type"] == "image/png"
    assert whole.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert whole.headers["content-length"] == str(len(data))
    etag = whole.headers["etag"]
    head = curl(f"/blobs/{digest}", head=True)
    assert (head.status, head.headers["content-length"]) == (200, str(len(data)))
    same = curl(f"/blobs/{digest}", "-H", f"If-None-Match: {etag}")
    assert (same.status, same.body) == (304, b"")
    for wanted, part in (
        ("0-9", data[:10]),
        ("10-", data[10:]),
        ("-7", data[-7:]),
        (f"5-{10**12}", data[5:]),
        ("0-0", data[:1]),
    ):
        found = curl(f"/blobs/{digest}", "-H", f"Range: bytes={wanted}")
        assert (found.status, found.body) == (206, part), wanted
        start = data.index(part) if part != data[5:] else 5
        last = start + len(part) - 1
        assert found.headers["content-range"] == f"bytes {start}-{last}/{len(data)}"
    beyond = curl(f"/blobs/{digest}", "-H", f"Range: bytes={len(data)}-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(data)}")
    for none in ("bytes=5-2", "bytes=-", "bytes=0-1,4-5", "items=0-1"):
        passed_over = curl(f"/blobs/{digest}", "-H", f"Range: {none}")
        assert (passed_over.status, passed_over.body) == (200, data)
        assert "content-range" not in passed_over.headers
    other = curl(f"/blobs/{digest}", "-H", "Range: bytes=0-9", "-H", 'If-Range: "other"')
    assert (other.status, other.body) == (200, data)


def test_what_is_no_blob_is_told(curl):
    assert curl(f"/blobs/{'0' * 64}").status == 404
    assert curl(f"/blobs/{'0' * 64}", head=True).status == 404
    assert curl("/blobs/picture.png").status == 400
    lied = curl.put(b"some bytes", digest="1" * 64)
    assert lied.status == 400 and lied.json["message"].startswith("header.sha256: ")
    endless = curl.put(b"some bytes", "-H", "Transfer-Encoding: chunked")
    assert endless.status == 411
    large = curl.put(b"", "-H", f"Content-Length: {65 * 2**20}")
    assert large.status == 400 and large.json["message"].startswith("header.size_bytes: ")
    assert curl("/blobs/" + "0" * 64, "-X", "DELETE").status == 405


def test_a_stored_page_runs_nowhere(curl):
    page = b"<!doctype html><script>document.title = 'run'</script>"
    assert curl.put(page, kind="text/html; charset=utf-8").status == 200
    digest = hashlib.sha256(page).hexdigest()
    shown = curl(f"/blobs/{digest}")
    assert shown.headers["content-type"] == "text/html"
    assert re.search(r"(^|; )sandbox(;|$)", shown.headers["content-security-policy"])
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert shown.headers["x-content-type-options"] == "nosniff"
    for place in ("script", "serviceworker", "worker", "style"):
        assert curl(f"/blobs/{digest}", "-H", f"Sec-Fetch-Dest: {place}").status == 403


def test_a_message_that_is_too_large_is_refused_as_over_grpc(curl):
    def of(size):
        return curl.call("GetJob", json.dumps({"name": "n" * size}).encode())

    assert of(5 * 2**20).reason == "MESSAGE_TOO_LARGE"
    assert of(5 * 2**20).status == 400
    assert of(13 * 2**20).status == 429


def test_a_deadline_and_a_request_id_reach_the_gateway(curl):
    # Composing takes longer than gRPC's finest deadline, a list of models may not.
    asked = pb.PlanCollageRequest(
        collage=system.collage(layers=[system.layer("a", x=7), system.layer("b")])
    )
    late = curl.call("PlanCollage", asked, "-H", "grpc-timeout: 1n")
    assert late.status == 504
    # Envoy leaves it to the gateway's gRPC, which calls it its own error.
    assert curl.call("ListModels", b"{}", "-H", "grpc-timeout: soon").status in (400, 500)
    # The longest that gRPC's headers can tell is 11,000 years, which Envoy at times makes one that cannot be read.
    assert curl.call("ListModels", b"{}", "-H", "grpc-timeout: 99999999H").status in (200, 500)


HOSTS = ("evil.example", "127.0.0.1.evil.example", "127.0.0.2", "127.0.0.1:80:80", "localhost@evil")


@pytest.mark.parametrize("host", HOSTS)
def test_another_name_is_not_answered_to(curl, host):
    for path in ("/", "/blobs/" + "0" * 64):
        answer = curl(path, "-H", f"Host: {host}")
        assert (answer.status, answer.reason) == (421, "HOST_NOT_NAMED")


def test_two_hosts_or_none_are_not_answered_to(curl):
    place = urlsplit(curl.url)
    for lines in (f"Host: {place.netloc}\r\nHost: {place.netloc}\r\n", "Host: \r\n", ""):
        with socket.create_connection((place.hostname, place.port), timeout=LIMIT_S) as raw:
            raw.sendall(f"GET / HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
            assert int(raw.recv(100).split()[1]) in (400, 421)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://"])
def test_a_page_of_another_origin_is_let_in_nowhere(curl, origin):
    forged = ("-H", f"Origin: {origin}")
    for answer in (
        curl.call("ListModels", b"{}", *forged),
        curl.put(b"bytes", *forged),
        curl("/", *forged),
        curl(SERVICE + "ListModels", "-X", "OPTIONS", *forged),
    ):
        assert answer.status == 403 and answer.reason == "ORIGIN_NOT_NAMED"
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_what_another_site_embeds_is_refused_and_a_link_to_the_page_is_not(curl):
    for site in ("cross-site", "same-site"):
        across = ("-H", f"Sec-Fetch-Site: {site}")
        blob = f"/blobs/{'0' * 64}"
        assert curl(blob, *across, "-H", "Sec-Fetch-Dest: image").status == 403
        assert curl.call("ListModels", b"{}", *across).status == 403
        visit = ("-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: document")
        assert curl("/", *across, *visit).status == 200
        framed = ("-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: iframe")
        assert curl("/", *across, *framed).status == 403


def test_whom_the_operator_names_may_come_in(opened):
    curl = opened(hosts=["studio.example"], origins=["https://app.example"])
    own = ("-H", "Host: studio.example", "-H", "Origin: https://studio.example")
    assert curl.call("ListModels", b"{}", *own).status == 200
    across = ("-H", "Origin: https://app.example")
    answer = curl.call("ListModels", b"{}", *across)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "origin" in answer.headers["vary"].lower()
    asked = curl(SERVICE + "ListModels", "-X", "OPTIONS", *across)
    assert asked.status == 204
    assert "content-type" in asked.headers["access-control-allow-headers"]
    assert curl.call("ListModels", b"{}", "-H", "Origin: https://other.example").status == 403


def test_the_page_asks_its_own_origin_alone(curl):
    page = curl("/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    script = re.search(r'src="\./(assets/[^"]+\.js)"', page.body.decode())[1]
    answer = curl(f"/{script}")
    assert answer.status == 200 and "javascript" in answer.headers["content-type"]
    assert "immutable" in answer.headers["cache-control"]
    assert curl("/", head=True).status == 200
    for path in (
        "/nothing",
        "/../pyproject.toml",
        "/%2e%2e/pyproject.toml",
        "/assets/../../package.json",
    ):
        answer = curl(path, "--path-as-is")
        assert (answer.status, answer.reason) == (404, "NO_PATH"), path


def test_what_the_page_begins_with(run, gateway):
    assert Curl(run.enter(serving("127.0.0.1:0", gateway=gateway)))("/start").status == 404
    found = {"collage": {"prompt": "a {cake}"}}
    other = Curl(run.enter(serving("127.0.0.1:0", gateway=gateway, start=lambda: found)))
    assert other("/start").json == found


@needs_connect
def test_the_client_that_pages_use(curl, tmp_path):
    (tmp_path / "contract.pb").write_bytes(descriptor_set())
    asked = request()
    (tmp_path / "request.json").write_text(json_format.MessageToJson(asked))
    saw = node("connect.mjs", curl.url, *sorted(tmp_path.iterdir()))
    assert saw["models"] == ["toy"]
    plan = json_format.ParseDict(saw["plan"], pb.Plan())
    by_json = curl.call(
        "PlanCollage", pb.PlanCollageRequest(collage=asked.collage, sampling=asked.sampling)
    )
    assert (
        plan.composite == json_format.Parse(by_json.body, pb.PlanCollageResponse()).plan.composite
    )
    assert saw["wrong"]["code"] == "InvalidArgument"
    assert saw["wrong"]["fields"] == ["collage.layers[1].noise"]
    assert saw["late"]["code"] == "DeadlineExceeded"
    assert saw["missing"] == {"code": "NotFound", "message": "no job 'jobs/none'", "fields": []}
    assert [place for place, _, _ in saw["log"]] == list(range(1, len(saw["log"]) + 1))
    assert saw["log"][-1][1] == "done"
    assert saw["resumed"] == [place for place, _, _ in saw["log"]][4:]
    assert (saw["aborted"], saw["state"]) == ("Canceled", pb.JOB_STATE_CANCELLED)
    assert saw["parts"] >= 2 and saw["whole"]


def framed(message, kind=0):
    return bytes([kind]) + len(message).to_bytes(4, "big") + message


def frames(body):
    found = []
    while body:
        size = int.from_bytes(body[1:5], "big")
        found.append((body[0], body[5 : 5 + size]))
        body = body[5 + size :]
    return found


def web(curl, method, body, *options):
    """A call in frames of gRPC-Web; the messages that came, and the trailers."""
    kind = ("-H", "Content-Type: application/grpc-web+proto")
    answer = curl(SERVICE + method, *kind, *options, data=body)
    assert answer.status == 200 and answer.headers["content-type"] == "application/grpc-web+proto"
    if "grpc-status" in answer.headers:
        return [], answer.headers
    *messages, (flag, trailers) = frames(answer.body)
    assert flag == 0x80 and {kind for kind, _ in messages} <= {0}
    pairs = (line.split(":", 1) for line in trailers.decode().splitlines() if line)
    return [data for _, data in messages], {name: value.strip() for name, value in pairs}


def test_its_bytes_are_those_of_grpc(run, curl, gateway):
    drawn = events(curl.call("GenerateImages", request()))
    name = drawn[-1][2]["job"]
    blob = next(told["image"]["blob"]["sha256"] for _, _, told in drawn if "image" in told)
    unary = ("GetJob", pb.GetJobRequest(name=name))
    stream = (
        ("WatchJob", pb.WatchJobRequest(name=name)),
        ("GetBlob", pb.GetBlobRequest(sha256=blob)),
    )

    async def by_grpc():
        async with system.connect(gateway) as channel:
            method, asked = unary
            told = [[await channel.unary_unary(SERVICE + method)(asked.SerializeToString())]]
            for method, asked in stream:
                call = channel.unary_stream(SERVICE + method)(asked.SerializeToString())
                told.append([data async for data in call])
            return told

    told = run(by_grpc())
    for (method, asked), data in zip((unary, *stream), told, strict=True):
        messages, trailers = web(curl, method, framed(asked.SerializeToString()))
        assert messages == data and data, method
        assert trailers["grpc-status"] == "0"

    async def failure():
        async with system.connect(gateway) as channel:
            try:
                await channel.unary_unary(SERVICE + "GetJob")(b"")
            except system.grpc.aio.AioRpcError as error:
                return error.details(), dict(error.trailing_metadata())["grpc-status-details-bin"]

    words, details = run(failure())
    messages, trailers = web(curl, "GetJob", framed(b""))
    assert messages == [] and trailers["grpc-status"] == "5"
    assert unquote(trailers["grpc-message"]) == words
    coded = trailers["grpc-status-details-bin"]
    assert base64.b64decode(coded + "=" * (-len(coded) % 4)) == details


def test_envoy_passes_grpc_as_well(run, curl):
    if curl.kind == "embedded":
        pytest.skip("gRPC is the gateway's own")

    async def by_grpc():
        async with system.connect(urlsplit(curl.url).netloc) as channel:
            stub = system.collage_service_pb2_grpc.CollageServiceStub(channel)
            data = system.cutout(93)
            stored = await stub.PutBlob(system.upload(data, media_type="image/png"))
            assert stored.blob.sha256 == hashlib.sha256(data).hexdigest()
            return [model.name for model in (await stub.ListModels(pb.ListModelsRequest())).models]

    assert run(by_grpc()) == ["toy"]


def test_files_of_other_tools_come_in_by_both(curl):
    answer = curl("/files/open?name=a.ora", data=b"no archive")
    assert (answer.status, answer.json["code"]) == (400, 3)


def test_a_server_on_every_address_names_one_that_answers(run, gateway):
    curl = Curl(run.enter(serving("0.0.0.0:0", gateway=gateway)))
    assert urlsplit(curl.url).hostname == "127.0.0.1"
    assert curl("/").status == 200
    assert curl("/", "-H", "Host: 0.0.0.0").status == 421


def test_frames_that_are_none_are_refused(curl):
    for body, code in (
        (b"", "3"),
        (framed(b"")[:3], "3"),
        (framed(b"\xff\xff"), "3"),
        # Envoy passes on what says that it is compressed.
        (framed(b"x" * 100, kind=1), "13" if curl.kind == "envoy" else "12"),
        (bytes([0]) + (2**32 - 1).to_bytes(4, "big"), "8"),
        (framed(b"x" * (9 * 2**20)), "8"),
    ):
        messages, trailers = web(curl, "GetJob", body)
        assert (messages, trailers["grpc-status"]) == ([], code), body[:8]
    assert web(curl, "Draw", framed(b""))[1]["grpc-status"] == "12"


def test_a_blob_in_frames_is_stored(curl):
    data = system.cutout(77)
    header = {"media_type": "image/png"}
    body = b"".join(framed(each.SerializeToString()) for each in system.upload(data, **header))
    (stored,), trailers = web(curl, "PutBlob", body)
    assert trailers["grpc-status"] == "0"
    assert pb.PutBlobResponse.FromString(stored).blob.sha256 == hashlib.sha256(data).hexdigest()


def test_the_configuration_of_production_is_one_that_envoy_takes(tmp_path):
    (tmp_path / "contract.pb").write_bytes(descriptor_set())
    done = subprocess.run(
        [program("envoy"), "--mode", "validate", "-c", edge.PRODUCTION, "--log-level", "warning"],
        cwd=tmp_path,
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, b" OK" in done.stdout) == (0, True), done.stderr.decode()
    # Nothing that it warns of: what is deprecated goes with the next version.
    assert not [line for line in done.stderr.decode().splitlines() if "[warning]" in line]


def test_envoy_sends_streams_in_json_to_our_door():
    (route,) = re.findall(r'regex: "/collage[^"]*/\(([A-Za-z|]+)\)"', edge.PRODUCTION.read_text())
    methods = pb.DESCRIPTOR.services_by_name["CollageService"].methods
    streams = {each.name for each in methods if each.server_streaming or each.client_streaming}
    assert set(route.split("|")) == streams


def raw(curl, head, body=b""):
    """A connection on which so much of a request was sent."""
    place = urlsplit(curl.url)
    connection = socket.create_connection((place.hostname, place.port), timeout=LIMIT_S)
    connection.sendall(f"{head}\r\nHost: {place.netloc}\r\n\r\n".encode() + body)
    return connection


POST = f"POST {SERVICE}%s HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d"


def test_whoever_goes_takes_the_job_along_where_that_was_asked_for(curl):
    asked = request(on_disconnect=pb.DISCONNECT_POLICY_CANCEL)
    asked.sampling.steps = 900
    body = json_format.MessageToJson(asked).encode()
    with raw(curl, POST % ("GenerateImages", len(body)), body) as connection:
        told = b""
        while b'"step"' not in told:
            told += connection.recv(65536)
    name = re.search(rb"jobs/job-[0-9a-f]+", told)[0].decode()

    def is_cancelled():
        job = curl.call("GetJob", json.dumps({"name": name}).encode()).json["job"]
        return job["state"] == "JOB_STATE_CANCELLED"

    asyncio.run(until(is_cancelled))


def limited(run, gateway, monkeypatch, **limits):
    """A door of our own with other limits."""
    for name, value in limits.items():
        for module in (calls, exchange):
            monkeypatch.setattr(module, name, value, raising=False)
    return Curl(run.enter(serving("127.0.0.1:0", gateway=gateway)))


def test_calls_that_are_too_many_are_refused_in_words(run, gateway, monkeypatch):
    curl = limited(run, gateway, monkeypatch, MAX_CALLS=2)
    # Two whose bodies never come.
    with raw(curl, POST % ("GetJob", 10)), raw(curl, POST % ("GetJob", 10)):
        refused = curl.call("ListModels", b"{}")
        assert refused.status == 429 and "2 calls are under way" in refused.json["message"]
    asyncio.run(until(lambda: curl.call("ListModels", b"{}").status == 200))


def test_bodies_that_hold_too_much_or_come_too_slowly_are_refused(run, gateway, monkeypatch):
    curl = limited(run, gateway, monkeypatch, MAX_HELD_BYTES=1000, MESSAGE_S=0.5)
    message = pb.GetJobRequest(name="jobs/" + "n" * 1000)
    refused = curl.call("GetJob", message)
    assert refused.status == 429 and "bytes of messages" in refused.json["message"]
    assert web(curl, "GetJob", framed(message.SerializeToString()))[1]["grpc-status"] == "8"
    for kind in ("application/json", "application/grpc-web+proto"):
        with raw(curl, (POST % ("GetJob", 10)).replace("application/json", kind), b"{") as slow:
            told = slow.recv(65536)
            while b"within 0.5 s" not in told:
                told += slow.recv(65536)
            assert told.split()[1] == (b"504" if kind == "application/json" else b"200")
    # What was held is given back.
    assert curl.call("ListModels", b"{}").status == 200


def test_the_commands_in_the_docs(curl, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/http.md").read_text(), re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "DOOR": curl.url, "PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT}/protos"},
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b'"name"' in done.stdout and b'"mediaType"' in done.stdout
    with Image.open(tmp_path / "salmon.png") as picture:
        assert picture.size == (64, 64)
    assert (tmp_path / "signature").read_bytes() == b"\x89PNG\r\n\x1a\n"
    rest = (tmp_path / "rest.txt").read_text()
    assert "\nid: 5\n" in f"\n{rest}" and "id: 4\n" not in rest and '"done"' in rest
    assert "JOB_NOT_FOUND" in (tmp_path / "error.txt").read_text()
    assert (tmp_path / "error.txt").read_text().endswith("\n404\n")
    assert (tmp_path / "contract.pb").read_bytes() == descriptor_set()


def test_a_head_that_does_not_come_is_not_waited_for(run, gateway, monkeypatch):
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    curl = Curl(run.enter(serving("127.0.0.1:0", gateway=gateway)))
    place = urlsplit(curl.url)
    # An exchange under way, which was looked at before the other is.
    with raw(curl, POST % ("GetJob", 2)) as waiting:
        with socket.create_connection((place.hostname, place.port), timeout=LIMIT_S) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: 12")
            assert slow.recv(100) == b""
        waiting.sendall(b"{}")
        assert waiting.recv(100).split()[1] == b"404"


@needs_chromium
def test_a_page_of_another_site_gets_nothing_in_a_real_browser(curl):
    data = system.cutout(91)
    assert curl.put(data).status == 200
    before = curl.call("ListJobs", b"{}").json
    saw = node("cross_site.mjs", curl.url, CHROMIUM, hashlib.sha256(data).hexdigest())
    assert set(saw["pages"]) == {"evil.example", "127.0.0.1", "localhost"}
    for site, got in saw["pages"].items():
        # What the browser lets no page see it calls opaque, or fails; nothing of it was done or told.
        for way in ("call", "plain", "put", "get", "start"):
            assert got[way] == "refused", (site, way)
        for way in ("blind", "blindGet", "page"):
            assert got[way] in ("opaque 0", "refused"), (site, way)
        assert (got["image"], got["script"]) == ("refused", "refused")
        assert got["framed"] != "Collage Studio"
        assert "ORIGIN_NOT_NAMED" in got["posted"]
        assert got["visit"] == 200
        # The visit and what its page loads came last; whatever came before was refused.
        # Playwright is not told of every one.
        assert set(got["statuses"][: got["statuses"].index(200)]) == {403}
    assert saw["rebound"] == 421
    assert (saw["own"], saw["call"], saw["policy"]) == (200, 200, [])
    assert curl.call("ListJobs", b"{}").json == before
    assert curl(f"/blobs/{'0' * 64}").status == 404
