"""The README's program runs as it stands, against the embedded system and the bundled model."""

import asyncio
import os
import re
import threading
from pathlib import Path

from PIL import Image

from local import embedded
from services.common.models_file import read_cutouts, read_detectors, read_sources

ROOT = Path(__file__).parents[1]


def test_the_program_in_the_readme_writes_its_picture(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1, "one program, the one that is tested here"
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def wait(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    server = wait(embedded.start(tmp_path / "data"))
    try:
        (tmp_path / "examples").symlink_to(ROOT / "examples")
        monkeypatch.chdir(tmp_path)
        program = blocks[0].replace("127.0.0.1:50051", server.address)
        exec(compile(program, "README.md", "exec"), {})
    finally:
        wait(server.stop())
        loop.call_soon_threadsafe(loop.stop)
    with Image.open(tmp_path / "bento-1.png") as picture:
        assert picture.size == (128, 128)


def test_the_models_file_in_the_readme_can_be_read(tmp_path):
    (text,) = re.findall(r"```yaml\n(models:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "models.yaml").write_text(text)
    (model,) = read_sources(str(tmp_path / "models.yaml"))
    assert model.limits.max_side == 1024
    detectors = {each.kind: each for each in read_detectors(str(tmp_path / "models.yaml"))}
    assert set(detectors) < set(model.controlnets)
    assert detectors["depth"].file == tmp_path / "detectors" / "depth.onnx"
    cutout, pointed, bundled = read_cutouts(str(tmp_path / "models.yaml"))
    assert (cutout.kind, cutout.side, bundled.kind) == ("hair", 512, "u2netp")
    assert pointed.decoder == tmp_path / "cutouts" / "sam2-decoder.onnx"


def test_every_path_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(
        r"`((?:protos|gateway|services|local|models(?!.yaml)|docs|benchmarks|examples)[\w/.-]*)`",
        text,
    )
    named += re.findall(r"\]\(([\w./-]+)\)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []
    modules = [
        ROOT / module.replace(".", os.sep) for module in re.findall(r"python -m ([\w.]+)", text)
    ]
    assert all(path.with_suffix(".py").exists() or path.is_dir() for path in modules)
