"""SavePretrained: a finished run leaves a whole folder with its trained weights, a stopped one leaves none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "model_type": "qwen3"}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
SAVING = (
    "{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}, "
    "{class_path: dlm_lightning.callbacks.save_pretrained.SavePretrained}"
)
STOPPING = (
    "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/nelbo, stopping_threshold: 1e9}}"
)


@pytest.fixture
def fit(typed, corpus, tmp_path):
    """`fit(callbacks)`: the run folder of an `ar_source` of 4 steps, validated after 2."""

    def run(callbacks: str):
        words = [f"data.paths=[{corpus}]", "data.val_share=0.2", "data.row_length=24", "data.val_rows=2"]
        words += ["data.vocab_size=300", "trainer.max_steps=4", "trainer.val_check_interval=2", f"model.config={MODEL}"]
        said = typed("fit", "ar_source", *words, f"trainer.callbacks=[{callbacks}]", "--run", "run", cwd=tmp_path)
        assert said.code == 0, said.err
        return tmp_path / "run"

    return run


def test_a_finished_runs_folder_is_whole_and_holds_the_trained_weights(fit):
    run = fit(SAVING)
    files = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not list(run.glob(".*partial"))
    network, report = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(report.values()), report
    trained = torch.load(run / "checkpoints" / "step=4" / "state.ckpt", weights_only=True)["state_dict"]
    trained = {name.removeprefix("denoiser.network."): value for name, value in trained.items()}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained[name]), name
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert network.config.vocab_size == len(tokenizer) + 1 == 301
    assert network.config.eos_token_id == tokenizer.eos_token_id is not None
    ids = tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "the quick brown fox"
    assert network(ids).logits.isfinite().all()


def test_a_run_that_stops_early_leaves_no_folder(fit):
    run = fit(f"{SAVING}, {STOPPING}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step=2"]
    assert not (run / "model").exists()
    assert not list(run.glob(".*partial"))
