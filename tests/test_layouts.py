"""Published diffusion models as sources: their layers, and how they say that they were trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlm_lightning import attention
from dlm_lightning.layouts import Diffusion
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.source import Source, build
from dlm_lightning.view import Pattern

PUBLISHED = {  # as their config.json files say it, with their classes, which only their own code knows
    "sdar": ("qwen3", {"block_size": 4, "architectures": ["SDARForCausalLM"]}, Diffusion("none", 4, 151669)),
    "Fast_dLLM_Qwen": ("qwen2", {"bd_size": 32}, Diffusion("next_token", 32, 151665)),
    "Dream": (
        "qwen2",
        {"mask_token_id": 151666, "architectures": ["DreamModel"]},
        Diffusion("next_token", None, 151666),
    ),
}


@pytest.fixture
def published(source_folder, tmp_path):
    """`published("sdar", mask_token_id=299)`: a tiny model in the layout of a published one, code and all."""

    def make(kind: str, **keys) -> Path:
        family, own, _ = PUBLISHED[kind]
        folder = shutil.copytree(source_folder(family), tmp_path / kind)
        values = json.loads((folder / "config.json").read_text())
        rope = values.pop("rope_parameters")
        code = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
        values |= {"model_type": kind, "rope_theta": 5e5, "auto_map": code, "torch_dtype": "float32", **own, **keys}
        assert rope["rope_type"] == "default"
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "modeling.py").write_text("raise SystemExit('code that a model brings along was run')")
        return folder

    return make


@pytest.mark.parametrize("kind", PUBLISHED)
def test_its_layers_are_those_of_its_family(kind, published, source_folder):
    family = PUBLISHED[kind][0]
    source = Source(str(published(kind)))
    assert source.config.model_type == family and source.config.rope_parameters["rope_theta"] == 5e5
    network = build(source.config, source, "eager")
    expected = AutoModelForCausalLM.from_pretrained(source_folder(family), attn_implementation="eager")
    expected.config.rope_parameters["rope_theta"] = 5e5
    expected = type(expected)._from_config(expected.config, attn_implementation="eager")
    expected.load_state_dict(network.state_dict())
    ids_BL = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(network(ids_BL).logits, expected(ids_BL).logits)
    assert torch.equal(network.state_dict()["lm_head.weight"], source.read("lm_head.weight"))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_it_says_how_it_was_trained(kind, published):
    assert Source(str(published(kind))).diffusion == PUBLISHED[kind][2]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_its_tokenizer_is_its_familys(kind, published, source_folder):
    mine = Source(str(published(kind))).tokenizer()
    theirs = AutoTokenizer.from_pretrained(source_folder(PUBLISHED[kind][0]))
    assert mine.get_vocab() == theirs.get_vocab() and mine("the fox")["input_ids"] == theirs("the fox")["input_ids"]


@pytest.mark.parametrize("kind, key", [("sdar", "block_size"), ("Fast_dLLM_Qwen", "bd_size")])
def test_blocks_of_no_size_are_refused(kind, key, published):
    with pytest.raises(ValueError, match=rf"config.json lacks {key}, the size of its blocks"):
        _ = Source(str(published(kind, **{key: None}))).diffusion


@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_what_its_file_says(tokenizer_class, source_folder, tmp_path):
    """transformers has a class for Qwen2 whose pre-tokenizer goes before the file's."""
    folder = shutil.copytree(source_folder("qwen2"), tmp_path / "qwen2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": tokenizer_class}))
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    bpe.save(str(folder / "tokenizer.json"))
    text = "fox jumps  over"
    assert Source(str(folder)).tokenizer()(text)["input_ids"] == bpe.encode(text).ids
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert bpe.encode(text).ids != Source(str(folder)).tokenizer()(text)["input_ids"]


def test_dreams_tokenizer_is_read_without_its_code(published, source_folder):
    """It comes as a vocabulary and merges, under a class that only its own code knows."""
    folder = published("Dream")
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    bpe.model.save(str(folder))
    settings = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["modeling.DreamTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    tokenizer = Source(str(folder)).tokenizer()
    assert tokenizer("the fox")["input_ids"] == bpe.encode("the fox").ids and tokenizer.eos_token_id is not None


def test_tensors_that_nobody_reads_are_named(source_folder, tmp_path, caplog):
    folder = shutil.copytree(source_folder(), tmp_path / "more")
    weights = load_file(folder / "model.safetensors")
    more = {f"model.layers.{n}.self_attn.q_proj.bias": torch.zeros(32) for n in range(2)}
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    source = Source(str(folder))
    build(source.config, source, "eager")
    assert "of qwen3 have no model.layers.0.self_attn.q_proj.bias and 1 more of its tensors" in caplog.text


def test_an_autoregressive_source_says_nothing_of_diffusion(source_folder):
    assert Source(str(source_folder())).diffusion is None


def test_null_takes_what_the_source_states(published):
    sdar = BlockCausal(source=str(published("sdar", mask_token_id=299)), block_size=None, shift=None)
    assert sdar.pattern == Pattern(4, "clean") and sdar.shift == "none"
    fast = ComplementaryMask(source=str(published("Fast_dLLM_Qwen", mask_token_id=7)), block_size=None, shift=None)
    assert fast.pattern == Pattern(32, "clean") and fast.shift == "next_token"
    for recipe, mask_id in ((sdar, 299), (fast, 7)):
        recipe.configure_model()
        assert recipe.mask_id == recipe.denoiser.mask_id == mask_id
        assert recipe.denoiser.network.config.vocab_size == 300  # nothing is added
        assert recipe.denoiser.network.config._attn_implementation == attention.NAME


def test_what_the_source_does_not_state_must_be_asked_for(published, source_folder):
    dream = str(published("Dream", mask_token_id=9))
    assert FullBidirectional(source=dream, shift=None).shift == "next_token"
    with pytest.raises(
        ValueError, match=r"model.block_size: null takes what a diffusion source states, and .* states none"
    ):
        BlockCausal(source=dream, block_size=None)
    with pytest.raises(ValueError, match=r"model.shift: null takes what a diffusion source states"):
        BlockCausal(source=str(source_folder()), shift=None)
    with pytest.raises(ValueError, match=r"model.shift: null .* no source states none"):
        BlockCausal(config={"model_type": "qwen3"}, shift=None)
    shutil.rmtree(dream)
    nameless = FullBidirectional(source=str(published("Dream", mask_token_id=None)))
    with pytest.raises(
        ValueError, match=r"model.mask_token must be named: the source does not state the one that it was trained with"
    ):
        nameless.configure_model()


def test_a_shift_or_a_mask_token_that_the_source_was_not_trained_with_is_refused(published):
    folder = str(published("sdar", mask_token_id=299))
    with pytest.raises(
        ValueError, match=r"model.shift: next_token would misread .*sdar, which was trained with none; null"
    ):
        ComplementaryMask(source=folder).configure_model()
    with pytest.raises(ValueError, match=r"model.mask_token: id 5, but the source was trained with 299"):
        BlockCausal(source=folder, mask_token=5).configure_model()
    ComplementaryMask(source=folder, shift="none").configure_model()
    BlockCausal(source=folder, block_size=8).configure_model()  # may grow
    ArSource(source=folder).configure_model()  # reads clear tokens only, which have one way to be read


def test_a_mask_token_beyond_the_embedding_is_refused(published):
    with pytest.raises(ValueError, match=r"model.mask_token: id 151669 is outside the vocabulary of 300 rows"):
        BlockCausal(source=str(published("sdar"))).configure_model()


def test_a_model_of_ours_that_lacks_its_mask_id_is_refused(source_folder, tmp_path):
    folder = shutil.copytree(source_folder("qwen3"), tmp_path / "ours")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"dlm": {"shift": "none", "block_size": 4}}))
    with pytest.raises(ValueError, match=r"ours/config.json states a diffusion model without its mask_id$"):
        _ = Source(str(folder)).diffusion


@pytest.mark.parametrize("kind", [["qwen3"], None, 3, {}])
def test_a_model_type_that_is_no_name_is_refused(source_folder, tmp_path, kind):
    folder = shutil.copytree(source_folder("qwen3"), tmp_path / "ours")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": kind}))
    with pytest.raises(ValueError, match=rf"ours/config.json has model_type {re.escape(json.dumps(kind))}, which is"):
        _ = Source(str(folder)).config


# LLaDA, whose config and tensors have names of their own

HEADS, KEY_HEADS, EPSILON, THETA, MASK = 4, 2, 1e-4, 5e5, 299
LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "mlp_hidden_size": 48, "n_layers": 2,
    "n_heads": HEADS, "n_kv_heads": KEY_HEADS, "max_sequence_length": 256, "vocab_size": 300, "embedding_size": 320,
    "weight_tying": False, "rms_norm_eps": EPSILON, "rope_theta": THETA, "mask_token_id": MASK, "block_type": "llama",
    "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False, "include_bias": False,
    "include_qkv_bias": False, "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
    "multi_query_attention": None, "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
}  # fmt: skip


@pytest.fixture
def llada(source_folder, tmp_path):
    """`llada(n_heads=3)`: a tiny LLaDA in two files, and a tokenizer."""

    def make(**keys) -> Path:
        folder = tmp_path / "llada"
        folder.mkdir()
        AutoTokenizer.from_pretrained(source_folder()).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(LLADA | keys))
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return 0.2 * torch.randn(shape, generator=generator)

        shapes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "attn_out": (32, 32), "ff_proj": (48, 32)}
        shapes |= {"up_proj": (48, 32), "ff_out": (32, 48)}
        weights = {"wte": random(320, 32), "ff_out": random(320, 32), "ln_f": 1 + random(32)}
        for layer in range(2):
            own = {name: random(*shape) for name, shape in shapes.items()}
            own |= {"attn_norm": 1 + random(32), "ff_norm": 1 + random(32)}
            weights |= {f"blocks.{layer}.{name}": weight for name, weight in own.items()}
        weights = {f"model.transformer.{name}.weight": weight for name, weight in weights.items()}
        named = dict.fromkeys(weights, "one.safetensors") | dict.fromkeys([*weights][7:], "two.safetensors")
        for file in ("one.safetensors", "two.safetensors"):
            save_file({name: weights[name] for name in weights if named[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
        return folder

    return make


def forward(folder: Path, ids_L: Tensor) -> Tensor:
    """Logits [L, V] of a LLaDA, written from its definition: pre-norm layers in which all tokens see each other."""
    w = {}
    for file in folder.glob("*.safetensors"):
        w |= {name.removeprefix("model.transformer."): weight for name, weight in load_file(file).items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * w[f"{name}.weight"]

    def turned(x_LHD):  # each half of a head's numbers is turned against the other
        half = x_LHD.shape[-1] // 2
        angle_LD = torch.arange(len(x_LHD))[:, None] / THETA ** (torch.arange(half) / half)
        cos, sin = angle_LD.cos()[:, None], angle_LD.sin()[:, None]
        a, b = x_LHD[..., :half], x_LHD[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x_LD = w["wte.weight"][ids_L]
    for layer in (f"blocks.{n}" for n in range(2)):
        own = norm(x_LD, f"{layer}.attn_norm")
        q, k, v = ((own @ w[f"{layer}.{name}_proj.weight"].T).unflatten(-1, (-1, 8)) for name in "qkv")
        q, (k, v) = turned(q), (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (turned(k), v))
        share = (torch.einsum("qhd,khd->hqk", q, k) / 8**0.5).softmax(-1)
        x_LD = x_LD + torch.einsum("hqk,khd->qhd", share, v).flatten(1) @ w[f"{layer}.attn_out.weight"].T
        own = norm(x_LD, f"{layer}.ff_norm")
        gate, up = (own @ w[f"{layer}.{name}_proj.weight"].T for name in ("ff", "up"))
        x_LD = x_LD + (gate * gate.sigmoid() * up) @ w[f"{layer}.ff_out.weight"].T
    return norm(x_LD, "ln_f") @ w["ff_out.weight"].T


def test_llada_computes_what_its_definition_says(llada):
    folder = llada()
    recipe = FullBidirectional(source=str(folder), shift=None)
    recipe.configure_model()
    assert recipe.shift == "none" and recipe.mask_id == MASK and Source(str(folder)).config.vocab_size == 320
    ids_BL = torch.tensor([[5, MASK, 7, MASK, MASK, 2, 40, MASK]])
    position_BL = torch.arange(8)[None]
    view = recipe.pattern.continuation(ids_BL, position_BL, torch.full((1, 1), 0))
    keep_N = torch.tensor([1, 3, 4, 7])
    found_NV = recipe.eval().denoiser(view, keep_N)
    known = recipe.denoiser.token_ids
    torch.testing.assert_close(found_NV[:, known], forward(folder, ids_BL[0])[keep_N][:, known], atol=1e-4, rtol=1e-4)


def test_tensors_of_llada_are_read_by_their_familys_names(llada):
    source = Source(str(llada()))
    network = build(source.config, source, "eager")
    assert {*source.names} == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert torch.equal(source.read(name), parameter) and source.shape(name) == [*parameter.shape]
        source.check(name, parameter.shape)
    with torch.no_grad():
        network.lm_head.weight.zero_()  # a source is mapped into memory, and not written to
    assert source.read("lm_head.weight").any()


def test_llada_is_imported_and_goes_on_as_one_of_ours(llada, typed, tmp_path):
    folder = llada()
    assert typed("import", folder, "--run", "run", cwd=tmp_path).code == 0
    said = typed("generate", "run", "--prompt", "the quick", "stopper.new_tokens=8", cwd=tmp_path)
    assert said.code == 0 and said.out.startswith("the quick"), said.err
    said = typed("export", "run", "out", cwd=tmp_path)
    assert said.code == 0, said.err
    exported = Source(str(tmp_path / "out"))
    said = exported.diffusion
    assert (said.shift, said.block_size, said.mask_id) == ("none", None, MASK)
    assert all(torch.equal(exported.read(name), Source(str(folder)).read(name)) for name in exported.names)
    said = typed("drift", folder, "out", cwd=tmp_path)
    assert said.code == 0, said.err
    moved = [line.replace("│", " ").split() for line in said.out.splitlines()]
    moved = {row[0]: float(row[1]) for row in moved if row[:1] in (["q"], ["down"], ["all"])}
    assert moved == {"q": 0, "down": 0, "all": 0}


@pytest.mark.parametrize("key, value", [("include_bias", True), ("block_type", "sequential"), ("scale_logits", True)])
def test_another_llada_is_refused_by_the_key(llada, key, value):
    with pytest.raises(ValueError, match=rf"config.json has {key}: {json.dumps(value)}, and only with .* of llama$"):
        _ = Source(str(llada(**{key: value}))).config
