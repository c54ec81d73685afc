"""Rules of the tree that import-linter cannot see: what starts without torch, and that no machine is named."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("door.server", ("torch", "diffusers", "transformers", "PIL", "gateway", "collage_client")),
        ("gateway.__main__", ("torch", "diffusers", "transformers", "PIL")),
        (
            "services.compositor.__main__",
            ("torch", "diffusers", "transformers", "onnxruntime", "huggingface_hub"),
        ),
        ("collage_client", ("torch", "numpy", "PIL", "gateway", "services", "local")),
    ],
)
def test_it_starts_without_what_its_image_does_not_hold(module, absent):
    program = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_no_file_names_a_machine_path_or_a_registry():
    tracked = subprocess.run(
        ["git", "ls-files"], check=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout.split()
    # Written in two halves, so that this file does not find itself.
    named = re.compile("/" + "(?:root|work|home)/|/" + "opt/pypi|find-" + "links")
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".proto", ".json", ""}
    found = [
        path
        for path in tracked
        if Path(path).suffix in suffixes
        and (ROOT / path).is_file()
        and named.search((ROOT / path).read_text(errors="replace"))
    ]
    assert found == []


def test_only_the_server_looks_at_what_time_a_call_has_left():
    """0 seconds left are no missing deadline, which `or` takes them for: `rpc.bounded` is asked."""
    found = [
        str(path.relative_to(ROOT))
        for room in ("gateway", "services")
        for path in (ROOT / room).rglob("*.py")
        if "time_remaining" in path.read_text()
    ]
    assert found == ["services/common/rpc.py"]


# What is imported from within the libraries of models: not what they export, so a release may move it. Those without a
# promise of their own are why pyproject.toml bounds the versions.
WITHIN = {
    "diffusers.configuration_utils": {"FrozenDict"},
    "diffusers.loaders": {"StableDiffusionLoraLoaderMixin"},
    "diffusers.models.attention_processor": {"Attention", "AttnProcessor2_0"},
    "diffusers.utils": {
        "convert_state_dict_to_diffusers",
        "convert_state_dict_to_peft",
        "convert_unet_state_dict_to_peft",
        "logging",
    },
    "diffusers.utils.peft_utils": {
        "delete_adapter_layers",
        "set_adapter_layers",
        "set_weights_and_activate_adapters",
    },
    "peft.utils.other": {"get_pattern_key"},
    "transformers.utils": {"logging"},
    "transformers.utils.logging": {"disable_progress_bar"},
}


def test_what_is_used_within_the_libraries_of_models_is_listed_and_bounded():
    used = {}
    for file in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.startswith(("diffusers.", "peft.", "transformers.")):
                used.setdefault(module, set()).update(each.name for each in node.names)
    assert used == WITHIN
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [each for names in extras["optional-dependencies"].values() for each in names]
    for library in ("diffusers", "peft", "transformers"):
        bounds = [each for each in needed if each.startswith(f"{library}>")]
        assert bounds and all(",<" in each for each in bounds), bounds
