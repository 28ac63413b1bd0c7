"""`dlm export`: what other tools load is what was trained."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlm_lightning.training import restore
from dlm_lightning.view import AUTOREGRESSIVE

KEEP = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}]"


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
