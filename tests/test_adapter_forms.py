"""LoRA files as the libraries write them: each draws what diffusers draws with it, or is told for what it is."""

import json

import numpy as np
import peft
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from services.common.collage import Adapter
from services.common.settings import InvalidSetting
from services.diffusion.text import Text
from services.generator.folder_card import load_stages, read_catalog
from testing import toy
from testing.parity import Case

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
# Strengths that differ by module, ranks too.
PATTERNS = {
    "alpha_pattern": {"to_q": 5, "mid_block.resnets.0.conv1": 1},
    "rank_pattern": {"to_v": 3},
}
CONFIGS = {
    "as wide as strong": {"r": 2, "lora_alpha": 2},
    "stronger": {"r": 2, "lora_alpha": 3},
    "by root": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "by module": {"r": 2, "lora_alpha": 3, **PATTERNS},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.mini(tmp_path_factory.mktemp("forms") / "mini")


@pytest.fixture(scope="module")
def case(folder):
    return Case(folder)


def fresh(folder, kind=StableDiffusionPipeline):
    return kind.from_pretrained(folder)


def filled(network):
    """A LoRA that acts: as it begins, one of its halves is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def both(folder, config, kind=StableDiffusionPipeline):
    """A pipeline with a LoRA in its U-Net and its text encoders."""
    pipeline = fresh(folder, kind)
    pipeline.unet.add_adapter(LoraConfig(target_modules=UNET, **config))
    for part in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipeline, part, None)) is not None:
            text = {key: value for key, value in config.items() if "pattern" not in key}
            encoder.add_adapter(LoraConfig(target_modules=TEXT, **text))
            filled(encoder)
    filled(pipeline.unet)
    return pipeline


def lora_weights(folder, target, config, *, metadata=True, old=False):
    """diffusers' `save_lora_weights`, with its notes on strength or without, and as it wrote text encoders once."""
    pipeline = both(folder, config)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    states = {part: get_peft_model_state_dict(network) for part, network in parts.items()}
    if old:
        states = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
    StableDiffusionPipeline.save_lora_weights(
        target,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        **(_collate_lora_metadata(parts) if metadata else {}),
    )
    return lambda pipeline: pipeline.load_lora_weights(target, adapter_name="one")


def lora_adapter(folder, target, config):
    """diffusers' `save_lora_adapter`, of one network."""
    both(folder, config).unet.save_lora_adapter(target)
    return lambda pipeline: pipeline.unet.load_lora_adapter(
        target, prefix=None, adapter_name="one", use_safetensors=True
    )


def peft_unet(folder, target, config):
    """PEFT's own `save_pretrained`, of the U-Net."""
    wrapped = get_peft_model(fresh(folder).unet, LoraConfig(target_modules=UNET, **config))
    filled(wrapped).save_pretrained(target)

    def theirs(pipeline):
        peft.PeftModel.from_pretrained(pipeline.unet, target, adapter_name="one")

    return theirs


def peft_text(folder, target, config):
    """The same of the text encoder."""
    text = {key: value for key, value in config.items() if "pattern" not in key}
    wrapped = get_peft_model(fresh(folder).text_encoder, LoraConfig(target_modules=TEXT, **text))
    filled(wrapped).save_pretrained(target)

    def theirs(pipeline):
        peft.PeftModel.from_pretrained(pipeline.text_encoder, target, adapter_name="one")

    return theirs


def transformers_text(folder, target, config):
    """transformers' `save_pretrained` of a text encoder with an adapter."""
    both(folder, config).text_encoder.save_pretrained(target)
    return lambda pipeline: pipeline.text_encoder.load_adapter(target, adapter_name="one")


WRITERS = {
    "save_lora_weights": lora_weights,
    "save_lora_weights, text of old": lambda *a: lora_weights(*a, metadata=False, old=True),
    "save_lora_weights, no notes": lambda *a: lora_weights(*a, metadata=False),
    "save_lora_adapter": lora_adapter,
    "adapter_model of a U-Net": peft_unet,
    "adapter_model of a text encoder": peft_text,
    "adapter_model by transformers": transformers_text,
}


def catalog(tmp_path, folder, source):
    (tmp_path / "models.yaml").write_text(
        f"models:\n  - name: toy\n    source: {folder}\n    adapters: {{one: {source}}}\n"
    )
    return read_catalog(str(tmp_path / "models.yaml"))


def drawn(case, tmp_path, folder, source, theirs):
    """The same picture by us and by diffusers, and one by the model alone."""
    (card,) = catalog(tmp_path, folder, source).cards
    case.stages = load_stages(card)
    strength = np.full(case.grid, 0.3)
    case.adapters = ()
    plain, _ = case.ours("euler", strength, 5.0)
    case.adapters = (Adapter(name="one"),)
    ours, _ = case.ours("euler", strength, 5.0)
    case.pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    case.pipeline.set_progress_bar_config(disable=True)
    theirs(case.pipeline)
    return ours, case.stock("euler", 0.3, 5.0), plain


@pytest.mark.parametrize(
    ("writer", "config"),
    [
        *((writer, "by module") for writer in WRITERS),
        *(("save_lora_weights", config) for config in CONFIGS if config != "by module"),
        *(("adapter_model of a text encoder", config) for config in ("stronger", "by root")),
    ],
)
def test_each_form_draws_what_diffusers_draws_with_it(tmp_path, folder, case, writer, config):
    theirs = WRITERS[writer](folder, tmp_path / "saved", CONFIGS[config])
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1
    ours, stock, plain = drawn(case, tmp_path, folder, tmp_path / "saved", theirs)
    assert (ours - plain).abs().max() > 1e-2
    assert torch.equal(ours, stock)


def test_names_of_modules_go_with_any_names_of_halves(tmp_path, folder, case):
    """The same LoRA as today's diffusers writes it, and as old attention processors and other tools named it."""
    tensors = {
        name: tensor
        for name, tensor in load_file(toy.lora(tmp_path / "a.safetensors", folder)).items()
        if name.startswith("unet.")
    }
    save_file(tensors, tmp_path / "a.safetensors")
    old, other, raw = {}, {}, {}
    for name, tensor in tensors.items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        side = {"lora_A": "down", "lora_B": "up"}[half]
        before, _, layer = module.removeprefix("unet.").removesuffix(".0").rpartition(".")
        old[f"{before}.processor.{layer}_lora.{side}.weight"] = tensor
        other[f"{module}.lora_{side}.weight"] = tensor
        other[f"{module}.alpha"] = torch.tensor(2.0)
        raw[f"{module.removeprefix('unet.')}.{half}.default.weight"] = tensor
    strength = np.full(case.grid, 0.1)
    case.adapters = (Adapter(name="one"),)
    found = []
    for number, each in enumerate((tensors, old, other, raw)):
        save_file(each, tmp_path / f"{number}.safetensors")
        (card,) = catalog(tmp_path, folder, tmp_path / f"{number}.safetensors").cards
        case.stages = load_stages(card)
        found.append(case.ours("euler", strength, 5.0)[0])
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_a_text_encoder_is_known_by_its_width_where_there_are_two(tmp_path):
    folder = toy.sdxl(tmp_path / "sdxl")
    pipeline = both(folder, CONFIGS["stronger"], StableDiffusionXLPipeline)
    for part in ("text_encoder", "text_encoder_2"):
        getattr(pipeline, part).save_pretrained(tmp_path / part)
        (card,) = catalog(tmp_path, folder, tmp_path / part).cards
        stages = load_stages(card)
        text = stages.facts.tokenize("a cake").ids_ET
        plain, changed = (
            stages.encode_text([Text(ids_ET=text)], on).hidden_BTD
            for on in ((), (Adapter(name="one"),))
        )
        # The first one's states are the first 32 of 80.
        is_changed = [
            not torch.equal(plain[..., a:b], changed[..., a:b]) for a, b in ((0, 32), (32, 80))
        ]
        assert is_changed == [part == "text_encoder", part == "text_encoder_2"]


def test_how_strong_an_adapter_is_counts_in_its_digest(tmp_path, folder):
    peft_unet(folder, tmp_path / "saved", CONFIGS["stronger"])
    (one,) = catalog(tmp_path, folder, tmp_path / "saved").cards
    config = tmp_path / "saved" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 4}))
    (other,) = catalog(tmp_path, folder, tmp_path / "saved").cards
    assert one.adapters["one"] != other.adapters["one"]


# What PEFT writes that is no plain LoRA, and what each is called.
METHODS = {
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, target_modules=UNET),
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=UNET),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=UNET),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["to_q"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["to_q"]),
    "IA3": lambda: peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["to_q"]),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=["to_q"]),
    "biases": lambda: LoraConfig(r=2, target_modules=UNET, bias="lora_only"),
    "lora_bias": lambda: LoraConfig(r=2, target_modules=UNET, lora_bias=True),
    "modules_to_save": lambda: LoraConfig(r=2, target_modules=UNET, modules_to_save=["conv_in"]),
    "pissa": lambda: LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_writes_otherwise_is_refused_by_name(tmp_path, folder, method):
    wrapped = get_peft_model(fresh(folder).unet, METHODS[method]())
    wrapped.save_pretrained(tmp_path / "saved")
    told = "is DoRA|asks for use_dora" if method == "DoRA" else method
    with pytest.raises(
        InvalidSetting, match=rf"adapters\.one: adapter_model\.safetensors: .*({told})"
    ):
        catalog(tmp_path, folder, tmp_path / "saved")


# By hand, as LyCORIS and others write them: their libraries are no dependency.
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FOREIGN = {
    "LoHa": [f"{KOHYA}.hada_w1_a", f"{KOHYA}.hada_w1_b", f"{KOHYA}.hada_w2_a", f"{KOHYA}.alpha"],
    "LoKr": [f"{KOHYA}.lokr_w1", f"{KOHYA}.lokr_w2_a", f"{KOHYA}.alpha"],
    "DoRA": [f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.dora_scale"],
    "GLoRA": [f"{KOHYA}.a1.weight", f"{KOHYA}.b1.weight", f"{KOHYA}.alpha"],
    "IA3": [f"{KOHYA}.weight", f"{KOHYA}.on_input"],
    "whole differences": [f"{KOHYA}.diff", f"{KOHYA}.diff_b"],
    "changes of norms": [f"{KOHYA}.w_norm", f"{KOHYA}.b_norm"],
    "LoCon with a core": [f"{KOHYA}.lora_mid.weight", f"{KOHYA}.lora_up.weight"],
    "OFT": [f"{KOHYA}.oft_blocks", f"{KOHYA}.alpha"],
    "AdaLoRA": ["unet.x.lora_A", "unet.x.lora_B", "unet.x.lora_E"],
    "LoRA with words": ["bundle_emb.sks.string_to_param.*", f"{KOHYA}.lora_up.weight"],
    "Control-LoRA": ["lora_controlnet", "input_blocks.0.0.up", "input_blocks.0.0.down"],
    "no LoRA: it holds 'conv_in.weight'": ["conv_in.weight"],
    "no LoRA: it holds 'clip_g'": ["clip_l", "clip_g"],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_others_write_otherwise_is_refused_by_name(tmp_path, folder, what):
    save_file({name: torch.ones(2, 2) for name in FOREIGN[what]}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidSetting, match=rf"adapters\.one: x\.safetensors: is {what}"):
        catalog(tmp_path, folder, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "its adapter_config.json, which says how strong it is, must lie beside it"),
        ("{", "adapter_config.json is not JSON"),
        ("[]", "adapter_config.json is not a JSON object"),
        ('{"lora_alpha": "high"}', "lora_alpha is 'high'; required: a number"),
        ('{"lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"alpha_pattern": [1]}', r"alpha_pattern is \[1\]"),
        ('{"alpha_pattern": {"(": 1}}', "adapter_model.safetensors: "),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ],
)
def test_a_config_of_any_content_is_told(tmp_path, folder, content, told):
    peft_unet(folder, tmp_path / "saved", CONFIGS["stronger"])
    config = tmp_path / "saved" / "adapter_config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    with pytest.raises(InvalidSetting, match=rf"adapters\.one: .*{told}"):
        catalog(tmp_path, folder, tmp_path / "saved")


@pytest.mark.parametrize(
    "change",
    [
        lambda t, k: t.update({f"{k}.alpha": torch.ones(3)}),
        lambda t, k: t.update({f"{k}.lora_down.weight": torch.ones(0, 16)}),
        lambda t, k: t.update({f"{k}.lora_down.weight": torch.tensor(1.0)}),
        lambda t, k: t.update({f"{k}.lora_up.weight": torch.ones(16, 2, 3)}),
        lambda t, k: t.update({f"{k}.lora_up.weight": torch.ones(16, 2, dtype=torch.int8)}),
        lambda t, k: t.update({"lora_te_x.lora_up.weight": torch.ones(2, 2)}),
        lambda t, k: t.update({"lora_unet_x_y.lora_up.weight": torch.ones(2, 2)}),
        lambda t, k: t.clear(),
    ],
)
def test_a_file_of_any_tensors_is_told(tmp_path, folder, change):
    tensors = load_file(toy.lora(tmp_path / "x.safetensors", folder, form="kohya"))
    change(tensors, KOHYA)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InvalidSetting, match=r"models: toy: adapters\.one: "):
        catalog(tmp_path, folder, tmp_path / "x.safetensors")
