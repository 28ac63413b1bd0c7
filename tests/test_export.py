"""`dlm export`: what other tools load is what was trained."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dlm_lightning.callbacks.weight_drift import last
from dlm_lightning.decode.decoder import decode
from dlm_lightning.generate import read, suited
from dlm_lightning.reopening import restore
from dlm_lightning.source import Source
from dlm_lightning.view import AUTOREGRESSIVE

KEEP = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}]"


RUNS = {  # family, recipe, overrides of its model
    "blocks": ("qwen3", "block_causal", {"block_size": 4}),
    "a causal context": ("qwen2", "block_causal", {"block_size": 4, "context_rank": "causal", "shift": "next_token"}),
    "a noisy context": ("llama", "block_causal", {"block_size": 4, "context": "noisy"}),
    "pairs": ("llama", "complementary_mask", {"block_size": 8}),
    "all tokens": ("qwen3", "full_bidirectional", {}),
    "all tokens, unshifted": ("qwen2", "full_bidirectional", {"shift": "none"}),
    "windows in some layers": ("gemma3_text", "block_causal", {"block_size": 4}),
    "windows in all layers": ("mistral", "complementary_mask", {"block_size": 4}),
}


@pytest.fixture(scope="module")
def exported(make_exported):
    """`exported(name)`: the recipe of a short run of RUNS, and the folder that it was exported to."""
    return cache(lambda name: make_exported(name, *RUNS[name]))


@pytest.fixture(scope="module")
def trained(source_folder, small, typed, tmp_path_factory):
    """`trained(family, recipe, options)`: the folder that holds a short run, `run`."""

    def train(family, recipe, options, theta=None, **source):
        folder = tmp_path_factory.mktemp("export")
        place = source_folder(family, **source)
        if theta:
            place = shutil.copytree(place, folder / "source")
            config = json.loads((place / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] = theta
            (place / "config.json").write_text(json.dumps(config))
        words = small(
            trainer__callbacks=KEEP,
            trainer__max_steps=2,
            model__source=place,
            **{f"model__{key}": value for key, value in options.items()},
        )
        assert typed("fit", recipe, *words, "--run", "run", cwd=folder).code == 0
        return folder

    return train


@pytest.fixture(scope="module")
def make_exported(trained, typed):
    def make(name, *run):
        folder = trained(*run)
        said = typed("export", "run", "out", cwd=folder)
        assert (said.code, said.out) == (0, "out\n"), said.err
        return restore(str(folder / "run"))[1].eval(), folder / "out"

    return make


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


PROMPTS = [[5, 17, 200, 41, 9, 33, 78], [101, 8, 8, 250]]


def padded(prompts, pad=0):
    """As a tokenizer pads on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    there = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": there}


def new_tokens(model, prompts, **options):
    """Of each prompt, without what pads them to one length."""
    batch, ends = padded(prompts), model._ends(torch.device("cpu")).tolist()
    found = []
    for row in model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
        assert set(row[stop:]) <= {model.generation_config.pad_token_id}
        found.append(row[:stop])
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", RUNS)
def test_plain_transformers_gives_the_same_logits(name, implementation, exported):
    """Of a document whose third block is being filled in, at the positions that predict its tokens."""
    recipe, folder = exported(name)
    model, denoiser = loaded(folder, attn_implementation=implementation), recipe.denoiser
    size = recipe.pattern.block_size or 4
    ids_BL = torch.randint(300, (2, 3 * size), generator=torch.Generator().manual_seed(1))
    ids_BL[:, 2 * size + 1 :] = denoiser.mask_id
    position_BL = torch.arange(3 * size).expand_as(ids_BL)
    view = recipe.pattern.continuation(ids_BL, position_BL, torch.full((2, 1), 2 * size))
    with torch.no_grad():
        logits = model(input_ids=ids_BL).logits
        asked = (ids_BL == denoiser.mask_id).flatten().nonzero().squeeze(1)
        expected = denoiser(view, asked)
    read = asked - int(recipe.shift == "next_token")
    found = logits.flatten(0, 1)[read]
    spared = expected.isfinite()
    assert spared[:, :300].all() and not spared[:, model.config.dlm["mask_id"]].any()
    torch.testing.assert_close(found[spared], expected[spared], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3}], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("name", RUNS)
def test_it_decodes_to_the_same_tokens(name, options, exported):
    recipe, folder = exported(name)
    plan = read(suited(recipe.denoiser), ["stopper.new_tokens=21", *(f"sampling.{k}={v}" for k, v in options.items())])
    expected = decode(recipe.denoiser, PROMPTS, plan, eos_ids=[recipe.tokenizer.eos_token_id])
    assert new_tokens(loaded(folder), PROMPTS, max_new_tokens=21, **options) == [row.new_ids for row in expected.rows]


def test_a_threshold_of_1_fills_in_one_token_per_forward(exported, monkeypatch):
    recipe, folder = exported("blocks")
    model, forwards = loaded(folder), []
    plan = read("block", ["stopper.new_tokens=9", "selector.threshold=1"])
    expected = decode(recipe.denoiser, PROMPTS[:1], plan, eos_ids=[recipe.tokenizer.eos_token_id])
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **o: forwards.append(1) or forward(*a, **o))
    assert new_tokens(model, PROMPTS[:1], max_new_tokens=9, threshold=1) == [expected.rows[0].new_ids]
    assert len(forwards) == expected.rows[0].forwards


ALONE = """
import json, sys
sys.modules["dlm_lightning"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
given = tokenizer("the quick brown fox", return_tensors="pt", return_token_type_ids=False)
out = model.generate(**given, max_new_tokens=16)
print(json.dumps([given["input_ids"].tolist(), out.tolist(), tokenizer.mask_token_id, tokenizer.decode(out[0])]))
"""


def test_without_this_project(exported, tmp_path):
    """In a process that cannot import it, from text to text."""
    recipe, folder = exported("pairs")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    prompt, out, mask_id, text = json.loads(done.stdout.splitlines()[-1])
    assert prompt == recipe.tokenizer(["the quick brown fox"])["input_ids"] and mask_id == recipe.mask_id
    plan = read("block", ["stopper.new_tokens=16"])
    expected = decode(recipe.denoiser, prompt, plan, eos_ids=[recipe.tokenizer.eos_token_id])
    assert out[0] == expected.rows[0].ids and text.startswith("the quick brown fox")


def test_nobody_takes_it_for_an_autoregressive_model(exported):
    """Without its code, transformers refuses it instead of decoding it causally."""
    _, folder = exported("blocks")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("key", ["block_size", "context", "context_rank", "shift", "mask_id", "banned"])
@pytest.mark.parametrize("tampering", ["missing", "wrong"])
def test_a_config_that_was_tampered_with_is_refused_by_the_key(key, tampering, exported, tmp_path):
    _, folder = exported("blocks")
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    if tampering == "missing":
        del values["dlm"][key]
    else:
        values["dlm"][key] = -1
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: dlm\.{key} is missing or is none that there is"):
        loaded(copy)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("contxt", 1, r"^config\.json: there is no key dlm\.contxt"),
        ("banned", [5], "dlm.banned"),
        ("banned", [["a", "b"]], "dlm.banned"),
        ("banned", [[300, 9999]], "dlm.banned"),
        ("banned", [[9, 3]], "dlm.banned"),
        ("block_size", 4.0, "dlm.block_size"),
        ("mask_id", 301, "dlm.mask_id"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(key, value, says, exported, tmp_path):
    copy = shutil.copytree(exported("blocks")[1], tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    values["dlm"][key] = value
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        loaded(copy)


def test_a_config_without_a_word_on_diffusion_is_refused(exported, tmp_path):
    copy = shutil.copytree(exported("blocks")[1], tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    del values["dlm"]
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"^config\.json has no dlm"):
        loaded(copy)


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[300, 4]], {}, "prompt 0 is empty or begins with the mask"),
        ([[4, 5]], {"attention_mask": torch.tensor([[0, 0]])}, "prompt 0 is empty"),
        ([[4] * 250], {"max_new_tokens": 7}, "250 tokens and 7 are to come; the model has 256 positions"),
        ([[4, 999]], {}, r"input_ids must be a tensor \[B, S\] of tokens below 301"),
        ([4, 5], {}, "input_ids must be a tensor"),
        ([[4, 5]], {"attention_mask": torch.ones(1, 3)}, "attention_mask must have the shape of input_ids"),
        ([[4, 5]], {"threshold": 0}, "threshold must lie in"),
        ([[4, 5]], {"top_p": 0}, "top_p must lie in"),
        ([[4, 5]], {"top_k": 0}, "top_k must be a whole number, at least 1"),
        ([[4, 5]], {"top_k": -3}, "top_k must be a whole number, at least 1"),
        ([[4, 5]], {"temperature": float("nan")}, "temperature must be at least 0"),
        ([[4, 5]], {"seed": 1.5}, "seed a whole number"),
        ([[4, 5]], {"forwards": 8}, "block_size and forwards are not asked for: this model has blocks of 4"),
        ([[4, 5]], {"max_new_tokens": -1}, "max_new_tokens must be a whole number, at least 0"),
        ([[4, 5]], {"max_new_tokens": 8.0}, "max_new_tokens must be a whole number"),
        ([[4, 5]], {"do_sample": True, "num_beams": 4}, "takes no do_sample, num_beams$"),
    ],
)
def test_what_cannot_be_decoded_is_refused(prompts, options, says, exported):
    with pytest.raises((ValueError, TypeError), match=says):
        loaded(exported("blocks")[1]).generate(torch.tensor(prompts), **options)


def test_what_asks_for_nothing_else_is_taken(exported):
    model, prompt = loaded(exported("blocks")[1]), torch.tensor(PROMPTS[:1])
    expected = model.generate(prompt, max_new_tokens=5)
    asked = {
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
        "streamer": None,
        "token_type_ids": torch.zeros(1, 7),
    }
    assert torch.equal(model.generate(prompt.int(), max_new_tokens=5, **asked), expected)
    model.generation_config.max_new_tokens = 5
    assert torch.equal(model.generate(prompt), expected)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    assert model.generate(prompt).shape == (1, 12)
    assert model.generate(prompt[:0]).shape == (0, 7)


def test_there_is_no_loss_that_would_mislead(exported):
    model, prompt = loaded(exported("blocks")[1]), torch.tensor(PROMPTS[:1])
    with pytest.raises(ValueError, match="this model has no loss of its own"):
        model(input_ids=prompt, labels=prompt)


@pytest.mark.parametrize("new", [0, 6])
@pytest.mark.parametrize("name", ["blocks", "pairs", "all tokens"])
def test_masks_in_a_prompt_are_filled_in(name, new, exported):
    recipe, folder = exported(name)
    prompt = [5, 17, 300, 41, 300, 300, 78]
    plan = read(suited(recipe.denoiser), [f"stopper.new_tokens={new}", "stopper.eos=false"])
    expected = decode(recipe.denoiser, [prompt], plan).rows[0].ids
    model = loaded(folder)
    model.generation_config.eos_token_id = None
    batch = {"input_ids": torch.tensor([[0, 0, *prompt]]), "attention_mask": torch.tensor([[0, 0] + [1] * 7])}
    assert model.generate(**batch, max_new_tokens=new).tolist() == [[0, 0, *expected]]
    assert 300 not in expected and len(expected) == 7 + new


def test_padding_on_either_side_changes_nothing(exported):
    model = loaded(exported("blocks")[1])
    ids = torch.tensor([PROMPTS[1] + [0, 0]])
    there = torch.tensor([[1] * 4 + [0, 0]])
    right = model.generate(ids, there, max_new_tokens=8)[0, 6:]
    alone = model.generate(torch.tensor(PROMPTS[1:]), max_new_tokens=8)[0, 4:]
    assert torch.equal(right, alone)
    left = padded(PROMPTS)
    with torch.no_grad():
        logits, own = model(**left).logits[1, 3:], model(torch.tensor(PROMPTS[1:])).logits[0]
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["blocks", "pairs", "all tokens"])
def test_it_is_a_source_like_any_other(name, exported, small, typed, tmp_path):
    """A run that goes on from it reads the same weights, and what it states of itself."""
    recipe, folder = exported(name)
    source = Source(str(folder))
    assert source.diffusion == recipe.diffusion
    assert type(source.config) is type(recipe.denoiser.network.config)
    for parameter_name, parameter in recipe.denoiser.network.named_parameters():
        assert torch.equal(source.read(parameter_name), parameter)
    kind = {"blocks": "block_causal", "pairs": "complementary_mask", "all tokens": "full_bidirectional"}[name]
    words = small(trainer__callbacks=KEEP, trainer__max_steps=1, model__source=folder, model__shift="null")
    said = typed("fit", kind, *words, "--run", "on", cwd=tmp_path)
    assert said.code == 0, said.err
    assert restore(str(tmp_path / "on"))[1].mask_id == recipe.mask_id


# In the layouts of published models

ROWS = 151936  # of Qwen's embedding, of which the tokenizer here knows 300
PUBLISHED = {
    "sdar": ("qwen3", "block_causal", {"block_size": 4, "mask_token": 151669}),
    "fast_dllm_v2": ("qwen2", "complementary_mask", {"block_size": 8, "mask_token": 151665}),
}


@pytest.fixture(scope="module")
def published(trained, typed):
    """`published(form)`: the recipe of a run from a source with a tied head, the folder, and what was said."""

    @cache
    def make(form):
        folder = trained(*PUBLISHED[form], theta=5e5, tied=True, rows=ROWS)
        said = typed("export", "run", "out", "--as", form, cwd=folder)
        assert (said.code, said.out) == (0, "out\n"), said.err
        return restore(str(folder / "run"))[1].eval(), folder / "out", said.err

    return make


def test_sglang_and_lmdeploy_find_what_they_read_of_sdar(published):
    """Names, shapes and keys as in the loading code of SGLang 0.5.23 (srt/models/sdar.py, srt/dllm/config.py) and of
    LMDeploy 0.18.0 (pytorch/models/sdar.py, pytorch/configurations/sdar.py)."""
    _, folder, said = published("sdar")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"][0] == "SDARForCausalLM" and config["model_type"] == "sdar"
    D, H, G, E, F, V, layers = (config[key] for key in READ)
    expected = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for n in range(layers):
        expected |= {
            f"model.layers.{n}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,), "post_attention_layernorm": (D,),
                "self_attn.q_proj": (H * E, D), "self_attn.k_proj": (G * E, D), "self_attn.v_proj": (G * E, D),
                "self_attn.o_proj": (D, H * E), "self_attn.q_norm": (E,), "self_attn.k_norm": (E,),
                "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
            }.items()
        }  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == expected  # noqa: SIM118
    assert (V, config["attention_bias"], config["sliding_window"], config["tie_word_embeddings"]) == (
        ROWS,
        False,
        None,
        False,
    )
    assert (config["block_size"], config["mask_token_id"]) == (4, 151669)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["rope_scaling"] is None
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).rope_theta == 5e5 == config["rope_theta"]
    assert "`block_size: 4`" in said and "`--dllm-block-length 4`" in said
    assert "does not fit the layout of Fast-dLLM v2: its layers are those of qwen2" in said


READ = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
)


def test_fast_dllm_v2s_own_keys(published):
    _, folder, said = published("fast_dllm_v2")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("Fast_dLLM_Qwen", ["Fast_dLLM_QwenForCausalLM"])
    assert (config["bd_size"], config["mask_token_id"]) == (8, 151665)
    assert "It fits the layout of Fast-dLLM v2" in said and "does not fit the layout of SDAR" in said


@pytest.mark.parametrize("form", PUBLISHED)
def test_no_row_that_is_no_token_is_ever_the_likeliest(form, published):
    """Engines take the argmax of all rows. Those of tokens are as they were."""
    recipe, folder, _ = published(form)
    model, denoiser = loaded(folder), recipe.denoiser
    ids_BL = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(2))
    ids_BL[:, 12:] = denoiser.mask_id
    with torch.no_grad():
        logits = model(input_ids=ids_BL).logits
    assert denoiser.network.config.tie_word_embeddings and not model.config.tie_word_embeddings
    assert logits.argmax(2).max() < 300 and model.lm_head(3 * torch.randn(999, 32)).argmax(1).max() < 300
    kept, before = model.lm_head.weight, denoiser.network.lm_head.weight
    assert torch.equal(kept[:300], before[:300]) and torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("form", PUBLISHED)
def test_a_published_layout_decodes_on_plain_transformers_and_is_a_source(form, published):
    recipe, folder, _ = published(form)
    plan = read("block", ["stopper.new_tokens=13"])
    expected = decode(recipe.denoiser, PROMPTS, plan, eos_ids=[recipe.tokenizer.eos_token_id])
    assert new_tokens(loaded(folder), PROMPTS, max_new_tokens=13) == [row.new_ids for row in expected.rows]
    source = Source(str(folder))
    assert source.diffusion == recipe.diffusion and type(source.config) is type(recipe.denoiser.network.config)
    assert not hasattr(source.config, "dlm")


@pytest.mark.parametrize(
    ("run", "form", "says"),
    [
        ("pairs", "sdar", "its layers are those of qwen3, and this model's of llama; it predicts with shift none"),
        ("a causal context", "fast_dllm_v2", "it reads prompts by whole blocks, and this model token by token"),
        ("all tokens", "sdar", "it decodes by blocks, and this model has none"),
        ("blocks", "sdar", "--as sdar does not fit this model: its mask token is 151669, and this model's 300\n"),
        ("windows in all layers", "sdar", "it has no sliding windows"),
    ],
)
def test_what_does_not_fit_a_published_layout_is_refused_with_the_reason(run, form, says, exported, typed, tmp_path):
    _, folder = exported(run)
    said = typed("export", folder.parent / "run", "other", "--as", form, cwd=tmp_path)
    assert said.code == 1 and says in said.err and not list(tmp_path.iterdir())


# And back again


@pytest.mark.parametrize("name", RUNS)
def test_an_export_that_is_imported_decodes_as_before(name, exported, typed, tmp_path):
    recipe, folder = exported(name)
    said = typed("import", folder, "--run", "back", cwd=tmp_path)
    assert (said.code, said.out) == (0, f"{tmp_path / 'back'}\n"), said.err
    _, back, step = restore(str(tmp_path / "back"))
    assert step == 0 and back.diffusion == recipe.diffusion
    plan = read(suited(recipe.denoiser), ["stopper.new_tokens=21"])
    ends = [recipe.tokenizer.eos_token_id]
    rows = [decode(one.eval().denoiser, PROMPTS, plan, eos_ids=ends).rows for one in (recipe, back)]
    assert rows[0] == rows[1]
    if name == "blocks":
        assert typed("export", "back", "again", cwd=tmp_path).code == 0
        card = (tmp_path / "again" / "README.md").read_text()
        assert "which was not trained here" in card and "converted from" not in card
        for file in ("config.json", "modeling_block_diffusion.py", "tokenizer.json", "generation_config.json"):
            assert (tmp_path / "again" / file).read_text() == (folder / file).read_text(), file
        weights = [load_file(place / "model.safetensors") for place in (folder, tmp_path / "again")]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[1][tensor], value) for tensor, value in weights[0].items())


@pytest.mark.parametrize("form", PUBLISHED)
def test_a_published_layout_that_is_imported_decodes_as_before(form, published, typed, tmp_path):
    """As its authors write it, too: without our own key, what its code fixes holds."""
    recipe, folder, _ = published(form)
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    del values["dlm"], values["rope_parameters"]
    (copy / "config.json").write_text(json.dumps(values))
    assert typed("import", copy, "--run", "back", cwd=tmp_path).code == 0
    back = restore(str(tmp_path / "back"))[1].eval()
    assert (back.pattern, back.shift, back.mask_id) == (recipe.pattern, recipe.shift, recipe.mask_id)
    plan = read("block", ["stopper.new_tokens=13"])
    ends = [recipe.tokenizer.eos_token_id]
    found = [row.new_ids for row in decode(back.denoiser, PROMPTS, plan, eos_ids=ends).rows]
    assert found == [row.new_ids for row in decode(recipe.denoiser, PROMPTS, plan, eos_ids=ends).rows]


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_an_imported_model_is_measured_like_a_run(max_shard_size, exported, corpus, typed, tmp_path):
    _, folder = exported("pairs")
    copy = shutil.copytree(folder, tmp_path / "copy")
    if max_shard_size != "5GB":
        loaded(folder).save_pretrained(copy, max_shard_size=max_shard_size)
        (copy / "model.safetensors").unlink()
        assert len(list(copy.glob("*.safetensors"))) > 2
    words = [f"data.paths=[{corpus}]", "data.row_length=24", "data.val_rows=4", "data.batch_size=2"]
    said = typed("import", copy, *words, "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    said = typed("generate", "run", "--prompt", "the quick", "stopper.new_tokens=8", cwd=tmp_path)
    assert said.code == 0 and said.out.startswith("the quick"), said.err
    assert typed("validate", "run", cwd=tmp_path).code == 0
    said = typed("drift", folder, "run", cwd=tmp_path)
    assert said.code == 0, said.err
    table = [line.replace("│", " ").split() for line in said.out.splitlines()]
    moved = [row for row in table if row[:1] in (["q"], ["down"], ["all"])]
    assert len(moved) == 3 and all(float(number) == 0 for row in moved for number in row[1:3])
    said = typed("eval", "run", "--prompts", "0", cwd=tmp_path)
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["step"] == 0
    for words in (("resume", "run"), ("replay", "run", "--step", "1")):
        said = typed(*words, cwd=tmp_path)
        assert said.code == 1 and "run is an imported model, which was not trained here" in said.err
    said = typed("summary", "run", cwd=tmp_path)
    assert said.code == 0 and "a continuation" in said.out and "likelihood at step" not in said.out


def test_what_cannot_be_imported_is_refused_and_leaves_nothing(exported, source_folder, typed, tmp_path):
    _, folder = exported("blocks")
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: w for n, w in weights.items() if n != name}, copy / "model.safetensors", metadata={"format": "pt"})
    llada = shutil.copytree(source_folder(), tmp_path / "llada")
    (llada / "config.json").write_text(json.dumps({"model_type": "llada2_moe", "mask_token_id": 299}))
    dream = shutil.copytree(source_folder("qwen2"), tmp_path / "dream")
    values = json.loads((dream / "config.json").read_text())
    (dream / "config.json").write_text(json.dumps(values | {"model_type": "Dream"}))
    for place, says in (
        (copy, f"has no tensor {name}"),
        (source_folder(), "LLaDA); an autoregressive model is converted by `dlm fit`"),
        ("nowhere", "there is no folder nowhere"),
        (llada, "says nothing of diffusion that is known here (exports of this project, SDAR, "),
        (dream, "model.mask_token must be named: the source does not state the one"),
    ):
        said = typed("import", place, "--run", "run", cwd=tmp_path)
        assert said.code == 1 and says in said.err, said.err
        assert not (tmp_path / "run").exists()
    assert typed("import", dream, "model.mask_token=299", "--run", "run", cwd=tmp_path).code == 0
    assert restore(str(tmp_path / "run"))[1].mask_id == 299


def tampered(folder: Path, copy: Path, **keys) -> Path:
    """A copy of an export whose config has other values, at `dlm` or beside it; None takes a key away."""
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text())
    for key, value in keys.items():
        place = values["dlm"] if key.startswith("dlm_") else values
        place[key.removeprefix("dlm_")] = value
        if value is None:
            del place[key.removeprefix("dlm_")]
    (copy / "config.json").write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"dlm_shift": "left"}, "states shift left, which is neither none nor next_token"),
        ({"dlm_shift": None}, "states a diffusion model without its shift"),
        ({"dlm_more": 1}, "has an unknown key dlm.more"),
        ({"dlm": None}, "is that of an export, and lacks the key dlm"),
        ({"dlm": [1]}, "has dlm: [1], which is no mapping"),
        ({"dlm_mask_id": 299.0}, "states mask_id 299.0, which is no whole number"),
        ({"dlm_mask_id": True}, "states mask_id true, which is no whole number"),
        ({"dlm_block_size": "4"}, 'states block_size "4", which is no whole number'),
        ({"hidden_act": "silly"}, "no model can be made of"),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            "has a tensor model.layers.1.input_layernorm.weight, which its config.json does not",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "has quantized weights"),
    ],
)
def test_a_tampered_export_is_not_imported(keys, says, exported, typed, tmp_path):
    folder = tampered(exported("blocks")[1], tmp_path / "copy", **keys)
    said = typed("import", folder, "--run", "run", cwd=tmp_path)
    assert said.code == 1 and says in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", [{"block_size": 8}, {"mask_token_id": 7}, {"dlm_shift": "next_token"}])
def test_a_folder_that_says_two_things_of_itself_is_not_imported(keys, published, typed, tmp_path):
    folder = tampered(published("sdar")[1], tmp_path / "copy", **keys)
    said = typed("import", folder, "--run", "run", cwd=tmp_path)
    name = next(iter(keys)).removeprefix("dlm_").replace("mask_token_id", "mask_id")
    assert said.code == 1 and f"states {name} " in said.err and "by those of sdar" in said.err, said.err


def test_an_import_takes_from_the_folder_what_the_folder_says(exported, published, typed, tmp_path):
    folder = exported("blocks")[1]
    for word in ("model.source=elsewhere", "model.pretrained=false", "model.class_path=ArSource"):
        said = typed("import", folder, word, "--run", "run", cwd=tmp_path)
        assert said.code == 1 and f"{word}: the folder says it" in said.err, said.err
    said = typed("import", folder, "--run", "run", "model.shift=next_token", cwd=tmp_path)  # behind an option
    assert said.code == 1 and "model.shift: next_token would misread" in said.err, said.err
    assert not (tmp_path / "run").exists()
    said = typed("import", folder, "--run", "run", "seed_everything", cwd=tmp_path)
    assert said.code == 2 and "argument key=value: seed_everything has no =" in said.err


# The card


def test_the_card_says_what_the_runs_files_say(source_folder, typed, small, tmp_path):
    source = shutil.copytree(source_folder("qwen2"), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nA source.\n")
    drift = "{class_path: dlm_lightning.callbacks.weight_drift.WeightDrift}"
    speed = "{class_path: dlm_lightning.callbacks.throughput.Throughput}"
    words = small(trainer__callbacks=f"[{KEEP[1:-1]}, {drift}, {speed}]", trainer__max_steps=3, model__source=source)
    assert typed("fit", "complementary_mask", *words, "--run", "run", cwd=tmp_path).code == 0
    assert typed("export", "run", "my-model", cwd=tmp_path).code == 0
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert card.data.library_name == "transformers" and "block diffusion" in card.data.tags
    text = card.text
    assert "# my-model" in text and 'from_pretrained("my-model", trust_remote_code=True)' in text
    assert "converted from a local qwen2 model" in text and "`complementary_mask`" in text
    assert str(tmp_path) not in text, "where things lay on this machine is nobody's business"
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    tokens = 3 * config["batch_size"] * config["row_length"]
    assert cells["steps"] == ["3"] and cells["tokens in rows"][0].startswith(f"{tokens:,} ")
    assert cells["tokens through the network"] == [f"{3 * tokens:,}"]
    assert cells["`model.block_size`"] == ["16"] and cells["`model.shift`"] == ["next_token"]
    with (tmp_path / "run" / "metrics.csv").open(newline="") as table:
        bounds = [row["val/nelbo"] for row in csv.DictReader(table) if row["val/nelbo"]]
    assert cells["NELBO, nats per token"] == [f"{float(bounds[0]):.3f}", f"{float(bounds[-1]):.3f}"]
    step, groups = last(tmp_path / "run" / "drift" / "drift.parquet")
    moved = [
        sum(groups[g]["mean_abs"] for g in names) / len(names)
        for names in (("q", "k", "v", "o"), ("gate", "up", "down"))
    ]
    assert step == 3 and cells["mean of the absolute differences"] == [f"{value:.3g}" for value in moved]


@pytest.mark.parametrize(
    ("family", "tied", "adapters"),
    [("qwen2", False, False), ("qwen3", True, False), ("llama", False, False), ("qwen3", False, True)],
)
def test_as_a_causal_model(family, tied, adapters, source_folder, make_batch, typed, small, tmp_path):
    """Its logits are those of the run's network under a causal view, and the mask token's row is gone."""
    words = small(
        trainer__callbacks=KEEP,
        trainer__max_steps=2,
        model__source=source_folder(family, tied),
        **({"model__lora__rank": 3} if adapters else {}),
    )
    assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    said = typed("export", "run", "out", "--as", "ar", cwd=tmp_path)
    assert (said.code, said.out) == (0, "out\n"), said.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((source_folder(family, tied) / "config.json").read_text())
    assert kept["vocab_size"] == 300 and kept["architectures"] == source["architectures"] and "dlm" not in kept
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= 300

    _, recipe, _ = restore(str(tmp_path / "run"))
    denoiser = recipe.denoiser.eval()
    view = AUTOREGRESSIVE.lay_out(make_batch([[20], [20]], length=20), [], denoiser.mask_id)
    with torch.no_grad():
        logits = model.eval()(input_ids=view.ids_BS).logits
        hidden = denoiser._hidden(view, view)
        expected = denoiser.network.get_output_embeddings()(hidden)
    assert expected.shape[2] > 300 and torch.allclose(logits, expected[..., :300], atol=1e-4)


def test_a_causal_export_of_a_source_that_was_trained_here_has_no_mask_row(finished, small, typed, tmp_path):
    """Its own training left a row for the mask token, the last one, and no source of such a source knows that."""
    words = small(trainer__callbacks=KEEP, trainer__max_steps=1)
    for arguments in (
        ("fit", "ar_source", *[word for word in words if "model.source" not in word], "--run", "run"),
        ("export", "run", "causal", "--as", "ar"),
    ):
        said = typed(*arguments, cwd=tmp_path)
        assert said.code == 0, said.err
    rows = json.loads((tmp_path / "causal" / "config.json").read_text())["vocab_size"]
    assert rows == len(AutoTokenizer.from_pretrained(tmp_path / "causal"))


def test_a_folder_that_holds_something_is_left_alone(finished, typed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for words, code, says in (
        (("done", "out", "--as", "ar"), 1, "out is there already"),
        (("nowhere", "new", "--as", "ar"), 1, "not a run folder"),
        (("done", " ", "--as", "ar"), 1, "OUT needs the name of a new folder"),
        (("done", "new", "--as", "onnx"), 2, "invalid choice"),
    ):
        said = typed("export", *words, cwd=tmp_path)
        assert said.code == code and says in said.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"] and not (tmp_path / "new").exists()
