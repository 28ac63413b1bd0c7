"""`dlm probe` on sources that convert, and on others."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dlm_lightning.probe import RECIPES


def words(text: str) -> str:
    """Without the borders of tables and the breaks of lines."""
    return " ".join(text.translate(str.maketrans("│┃", "  ")).split())


def test_it_says_what_the_source_is_and_what_step_0_will_say(source_folder, corpus, typed, tmp_path):
    folder = shutil.copytree(source_folder("gemma3_text", tied=True), tmp_path / "source")
    (folder / "README.md").write_text("---\nlicense: gemma\n---\n")
    options = [f"data.paths=[{corpus}]", "data.row_length=32", "trainer.max_steps=2"]
    said = typed("probe", folder, *options, cwd=tmp_path)
    assert said.code == 0, said.err
    text = words(said.out)
    for line in (
        "architecture gemma3_text, 2 layers of width 32",
        "attention 4 heads, 2 for keys; a sliding window of 6 in 1 layers",
        "vocabulary 300 tokens in 300 rows, head tied to the embedding",
        "mask token row 300, which is added and starts from mean",
        "licence gemma",
        "logits under a causal view are the source's own",
    ):
        assert line in text, line
    network = AutoModelForCausalLM.from_pretrained(folder)
    assert f"embedding {301 * 32:,}" in text
    assert f"all {sum(p.numel() for p in network.parameters()) + 32:,} 100.0%" in text
    for recipe in RECIPES:
        assert f"{recipe}: converts; who sees whom holds" in text
        run = typed(
            "fit", recipe, f"model.source={folder}", *options, "data.val_rows=16", "data.batch_size=4", cwd=tmp_path
        )
        assert run.code == 0, run.err
        [step_0] = [line for line in run.out.splitlines() if line.startswith("step 0:")]
        assert step_0 in said.out.splitlines()


def test_a_named_mask_token_is_named(source_folder, corpus, typed, tmp_path):
    said = typed("probe", source_folder(rows=320), f"data.paths=[{corpus}]", "model.mask_token=z", cwd=tmp_path)
    assert said.code == 0 and "the token z" in words(said.out)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder model"),
        ({"model_type": "mamba"}, "mamba has linear_attention layers, which no attention mask reaches"),
        ({"model_type": "bloom"}, "bloom has no causal model that uses transformers' attention interface"),
        ({"model_type": "sothebys"}, "is of model_type sothebys, which transformers does not know; code"),
        ({}, "is of model_type none, which transformers does not know"),
    ],
)
def test_what_cannot_convert_is_refused_by_name(config, says, source_folder, typed, tmp_path):
    folder = shutil.copytree(source_folder(), tmp_path / "source")
    if config.get("model_type") in ("t5", "mamba", "bloom"):
        config = AutoConfig.for_model(**config).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["probe", folder], ["fit", "block_causal", f"model.source={folder}"]):
        said = typed(*command, cwd=tmp_path)
        assert said.code == 1 and says in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "runs" / "block_causal" / "1").exists()


def test_a_config_that_is_no_json_is_named(source_folder, typed, tmp_path):
    folder = shutil.copytree(source_folder(), tmp_path / "source")
    (folder / "config.json").write_text("{")
    said = typed("probe", folder, cwd=tmp_path)
    assert said.code == 1 and f"model.source: {folder}/config.json is not JSON" in said.err


def test_nothing_is_left_behind(source_folder, corpus, typed, tmp_path):
    AutoTokenizer.from_pretrained(source_folder())
    typed("probe", source_folder(), f"data.paths=[{corpus}]", "data.row_length=32", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
