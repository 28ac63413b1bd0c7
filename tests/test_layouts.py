"""Published diffusion models as sources: their layers, and how they say that they were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
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
