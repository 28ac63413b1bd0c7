import csv
import gc
import shutil

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM

from dlm_lightning.callbacks.weight_drift import SCHEMA, WeightDrift, frees_cycles, last
from dlm_lightning.data.text_files import TextFiles
from dlm_lightning.data.tokenizer import trained_tokenizer
from dlm_lightning.drift import by_group, measure
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal

CONFIG = dict(
    model_type="qwen3",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `source`, a tiny model with a tokenizer, and `texts`."""
    folder = tmp_path_factory.mktemp("drift")
    (folder / "texts").mkdir()
    for n in range(6):
        (folder / "texts" / f"{n}.txt").write_text(f"{n} words of a text, again and again. " * 40)
    tokenizer = trained_tokenizer(lambda: ["words of a text, again and again. "], 300, folder / "tokenizer")
    tokenizer.save_pretrained(folder / "source")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIG, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    return folder


def fit(folder, run, recipe=None, steps=5, every=2, resume=None, checkpoints=0, accumulate=1):
    """Train a tiny recipe in `run`; returns the trainer, the recipe and the callback."""
    recipe = recipe or BlockCausal(block_size=4, source=str(folder / "source"))
    vocab_size = 300 if recipe.config_values else None
    data = TextFiles(
        [str(folder / "texts")],
        row_length=16,
        batch_size=2,
        val_rows=2,
        vocab_size=vocab_size,
        cache_dir=str(run / "cache"),
    )
    drift = WeightDrift(every_n_steps=every)
    saving = [ModelCheckpoint(run / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=checkpoints)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=run,
        callbacks=[drift, *(saving if checkpoints else [])],
        logger=CSVLogger(run, name="", version=f"from-{resume or 0}"),
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=bool(checkpoints),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = str(run / "checkpoints" / f"step={resume}.ckpt") if resume else None
    trainer.fit(recipe, data, ckpt_path=path, weights_only=False)
    return trainer, recipe, drift


def table(run):
    return pq.read_table(run / "drift" / "drift.parquet")


def test_table_picture_and_logged_metrics(folder, tmp_path):
    _, recipe, _ = fit(folder, tmp_path, accumulate=2)
    assert table(tmp_path).schema == SCHEMA
    steps = table(tmp_path)["step"].to_pylist()
    assert sorted(set(steps)) == [2, 4, 5]
    assert steps.count(2) == steps.count(4) == steps.count(5)  # once a step, not once a micro-batch
    pictures = sorted((tmp_path / "drift").glob("*.png"))
    assert [path.name for path in pictures] == [f"step_{step:06d}.png" for step in (2, 4, 5)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)

    wanted = by_group(measure(recipe.denoiser.network, recipe.source))
    assert last(tmp_path / "drift" / "drift.parquet") == (5, wanted)
    assert wanted["q"]["rel_fro"] > 0

    with (tmp_path / "from-0" / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    with_loss = {row["step"] for row in logged if row["train/loss"]}
    drifted = {row["step"]: row for row in logged if row["drift/q/rel_fro"]}
    assert set(drifted) == {"1", "3", "4"} <= with_loss
    assert float(drifted["4"]["drift/q/rel_fro"]) == pytest.approx(wanted["q"]["rel_fro"])
    [share] = [row["drift/seconds_share"] for row in logged if row["drift/seconds_share"]]
    assert 0 < float(share) < 1


def test_a_continued_run_goes_on_with_its_table(folder, tmp_path):
    fit(folder, tmp_path, steps=6, checkpoints=3)
    whole = table(tmp_path)
    (tmp_path / "drift" / "step_000006.png").unlink()
    fit(folder, tmp_path, steps=6, checkpoints=3, resume=3)
    assert table(tmp_path)["step"].to_pylist() == whole["step"].to_pylist()
    assert table(tmp_path).equals(whole)
    assert (tmp_path / "drift" / "step_000006.png").is_file()


def test_what_was_measured_after_the_checkpoint_is_forgotten(folder, tmp_path):
    fit(folder, tmp_path, steps=6, checkpoints=3)
    fit(folder, tmp_path, steps=6, every=5, resume=3)
    assert sorted(set(table(tmp_path)["step"].to_pylist())) == [2, 5, 6]
    pictures = sorted(path.name for path in (tmp_path / "drift").glob("*.png"))
    assert pictures == ["step_000002.png", "step_000005.png", "step_000006.png"]


def test_a_new_run_starts_a_new_table(folder, tmp_path):
    fit(folder, tmp_path, steps=4)
    fit(folder, tmp_path, steps=2)
    assert set(table(tmp_path)["step"].to_pylist()) == {2}


def test_no_figure_outlives_its_picture(folder, tmp_path):
    gc.collect()
    gc.disable()
    try:
        fit(folder, tmp_path)
        assert not gc.isenabled()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, Figure)]
    finally:
        gc.enable()
    with frees_cycles():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_without_a_source_nothing_is_measured(folder, tmp_path):
    _, _, drift = fit(folder, tmp_path, ArSource(config=CONFIG), steps=2, every=1)
    assert not (tmp_path / "drift").exists()
    assert drift._measurements == 0


def test_random_weights_are_measured_against_the_source(folder, tmp_path):
    recipe = BlockCausal(block_size=4, source=str(folder / "source"), pretrained=False)
    fit(folder, tmp_path, recipe, steps=1)
    _, groups = last(tmp_path / "drift" / "drift.parquet")
    assert groups["q"]["rel_fro"] > 1  # two independent draws lie √2 apart


def test_parameters_whose_names_the_source_lacks_are_left_out_with_one_warning(folder, tmp_path, caplog):
    shutil.copytree(folder / "source", tmp_path / "source")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "vocab_size": 300}
    config = AutoConfig.for_model(**CONFIG | {"model_type": "qwen3_moe"} | experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")  # one file entry per expert
    _, recipe, _ = fit(folder, tmp_path, BlockCausal(block_size=4, source=str(tmp_path / "source")), steps=2, every=1)
    left_out = {name for name, _ in recipe.denoiser.network.named_parameters() if ".experts." in name}
    [said] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == (
        "WeightDrift leaves out 4 parameters whose names the source's files do not have, "
        "model.layers.0.mlp.experts.gate_up_proj the first"
    )
    assert not left_out & set(table(tmp_path)["name"].to_pylist())


def test_every_n_steps_must_be_positive():
    with pytest.raises(ValueError, match="every_n_steps"):
        WeightDrift(every_n_steps=0)
