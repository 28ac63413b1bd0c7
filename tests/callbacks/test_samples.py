"""Samples: what is written at each validation is what the decoder makes of the run's own weights."""

from __future__ import annotations

import pytest

from dlm_lightning import checkpoint
from dlm_lightning.callbacks.samples import Samples
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import Nothing
from dlm_lightning.decode.selector import Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.reopening import reopen

CALLBACKS = (
    "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}, "
    "{class_path: dlm_lightning.callbacks.samples.Samples, "
    "init_args: {prompts: [the quick, jumps over], new_tokens: 5, threshold: 0.5}}]"
)


def test_a_file_per_validation_holds_the_continuation_of_each_prompt(typed, small, tmp_path):
    words = small(trainer__callbacks=CALLBACKS)
    assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    files = sorted((tmp_path / "run" / "samples").iterdir())
    assert [file.name for file in files] == [f"step_{step:06d}.txt" for step in (0, 4, 6)]
    _, cli = reopen(str(tmp_path / "run"), "--trainer.logger=false")
    recipe = cli.model
    recipe.configure_model()
    checkpoint.load_weights(recipe.eval(), checkpoint.newest(tmp_path / "run"))
    for prompt in ("the quick", "jumps over"):
        ids = recipe.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        decoded = decode(recipe.denoiser, [ids], Plan(selector=Threshold(0.5), cache=Nothing(), stopper=Stopper(5)))
        assert f"[{prompt}]{recipe.tokenizer.decode(decoded.rows[0].new_ids)}\n" in files[-1].read_text()
        assert f"({decoded.tokens_per_forward:.2f} tokens per forward)" in files[-1].read_text()


def test_without_prompts_the_beginnings_of_validation_documents_are_continued(typed, small, tmp_path):
    words = small(trainer__callbacks="[{class_path: dlm_lightning.callbacks.samples.Samples}]")
    assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    _, cli = reopen(str(tmp_path / "run"))
    cli.datamodule.trainer, cli.model.trainer = cli.trainer, cli.trainer
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.setup("validate")
    prompts = [cli.model.tokenizer.decode(ids) for ids in cli.datamodule.prompts(3)]
    assert len(prompts) == 3 and all(prompts)
    for file in (tmp_path / "run" / "samples").iterdir():
        assert all(f"[{prompt}]" in file.read_text() for prompt in prompts)


@pytest.mark.parametrize("prompts", [(), ("",), ("a", "")])
def test_prompts_that_cannot_be_continued_are_refused(prompts):
    with pytest.raises(ValueError, match=r"Samples\.prompts"):
        Samples(prompts)
