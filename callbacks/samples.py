"""Decodes a few prompts at each validation: the first thing to look at while a model is converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import exact
from dlm_lightning.decode.selector import Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.module import Recipe

FOLDER = "samples"
FROM_DATA = 3  # prompts that are taken where none are given


class Samples(L.Callback):
    """Writes greedy continuations to `<run>/samples/step_000100.txt` and TensorBoard; it holds no state.

    Decoding is plain and block-wise, with the pattern and token shift of the recipe.

    Args:
        prompts: texts to continue; null takes beginnings of validation documents, of a chat the prompt.
        new_tokens: tokens per continuation.
        threshold: a masked token is committed when its probability is above this; the surest one always is.
    """

    def __init__(self, prompts: tuple[str, ...] | None = None, new_tokens: int = 32, threshold: float = 0.9) -> None:
        if prompts is not None and not (prompts and all(prompts)):
            raise ValueError("Samples.prompts: give at least one prompt, and none that is empty")
        self.prompts, self.new_tokens, self.threshold = prompts, new_tokens, threshold

    def on_validation_end(self, trainer: L.Trainer, recipe: Recipe) -> None:
        denoiser, tokenizer = recipe.denoiser, recipe.tokenizer
        plan = Plan(selector=Threshold(self.threshold), cache=exact(denoiser), stopper=Stopper(self.new_tokens))
        lines = []
        for ids in self._prompts(trainer, recipe):
            decoded = decode(denoiser, [ids], plan, eos_ids=[tokenizer.eos_token_id])
            prompt, text = tokenizer.decode(ids), tokenizer.decode(decoded.rows[0].new_ids)
            lines.append(f"[{prompt}]{text}\n({decoded.tokens_per_forward:.2f} tokens per forward)")
        self._write(trainer, "\n".join(lines))

    def _prompts(self, trainer: Any, recipe: Recipe) -> list[list[int]]:
        if self.prompts is None:
            return trainer.datamodule.prompts(FROM_DATA)
        return [recipe.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in self.prompts]

    @rank_zero_only
    def _write(self, trainer: L.Trainer, text: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text.replace("\n", "  \n"), trainer.global_step)
        if trainer.loggers:
            folder = Path(trainer.default_root_dir) / FOLDER
            folder.mkdir(exist_ok=True)
            (folder / f"step_{trainer.global_step:06d}.txt").write_text(text + "\n", encoding="utf-8")
        else:
            print(text)
