"""Files of other tools at the door: a whole system behind it, and plain HTTP."""

import asyncio
import io
import json
import urllib.error
import urllib.request
import zipfile

import pytest
from google.protobuf import json_format

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient, files
from door.server import serving
from interchange import work
from local import embedded
from testing import toy

TIMEOUT_S = 60
EXAMPLE = "examples/bento"


def posted(url, body, kind="application/json"):
    """Status, headers and body of an answer."""
    request = urllib.request.Request(url, data=body, method="POST", headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture(scope="module")
def collage(request):
    return files.attach(files.load(request.config.rootpath / EXAMPLE))


async def test_a_collage_goes_out_of_the_door_as_a_file_and_comes_in_again(tmp_path, collage):
    model = str(toy.mini(tmp_path / "toy"))
    server = await embedded.start(tmp_path / "data", model=model, threads=1)
    try:
        async with serving("127.0.0.1:0", gateway=server.address) as url:
            await told(url, server.address, collage)
    finally:
        await server.stop()


async def told(url, gateway, collage):
    async def post(path, body, kind="application/json"):
        return await asyncio.to_thread(posted, f"{url}/files/{path}", body, kind)

    data = work.saved(collage, "ora")
    status, headers, body = await post("open?name=bento.ora", data, "application/octet-stream")
    assert (status, headers["content-type"]) == (200, "application/json")
    answer = json.loads(body)
    assert answer["warnings"] == []
    opened = json_format.ParseDict(answer["collage"], collage_pb2.Collage())
    assert [layer.name for layer in opened.layers] == [layer.name for layer in collage.layers]
    async with AsyncCollageClient(gateway) as client:
        for layer, was in zip(opened.layers, collage.layers, strict=True):
            assert await client.fetch(layer.image.blob) == was.image.data
        drawn = await client.put(member(data, "mergedimage.png"))

    # What the page has is blobs; out goes the same file, and with the picture drawn of it another.
    wanted = {"collage": answer["collage"]}
    for form, kind in (
        ("ora", "image/openraster"),
        ("psd", "image/vnd.adobe.photoshop"),
        ("zip", "application/zip"),
    ):
        status, headers, body = await post(f"save?form={form}", json.dumps(wanted).encode())
        assert (status, headers["content-type"]) == (200, kind)
        assert headers["content-disposition"] == f'attachment; filename="collage.{form}"'
        assert body == work.saved(collage, form)
    with_result = {**wanted, "result": {"sha256": drawn.sha256}}
    status, _, body = await post("save?form=ora", json.dumps(with_result).encode())
    assert member(body, "data/result.png") == member(data, "mergedimage.png")

    for path, sent, code, field in (
        ("open", b"no file", 400, "file"),
        ("open", data[:-40], 400, "file"),
        ("save?form=gif", json.dumps(wanted).encode(), 400, "form"),
        ("save?form=ora", b"[]", 400, "request"),
        ("save?form=ora", b'{"collage": {"layers": 3}}', 400, "collage"),
        ("save?form=ora", b'{"collage": {}}', 400, "collage.size.width"),
    ):
        status, _, body = await post(path, sent)
        assert (status, violated(body)) == (code, field)
    none = {**wanted, "result": {"sha256": "none"}}
    status, _, body = await post("save?form=ora", json.dumps(none).encode())
    assert (status, violated(body)) == (400, "result.sha256")
    for layer in wanted["collage"]["layers"]:
        layer["image"]["blob"]["sha256"] = "0" * 64
    status, _, body = await post("save?form=ora", json.dumps(wanted).encode())
    assert status == 400
    assert "BLOB_MISSING" in body.decode()
    assert (await post("close", b""))[0] == 501


def member(data, name):
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return opened.read(name)


def violated(body):
    details = json.loads(body)["details"]
    (bad,) = [each for each in details if each["@type"].endswith("BadRequest")]
    return bad["fieldViolations"][0]["field"]
