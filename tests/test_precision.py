"""Precision: the network is built in it, rotary frequencies and the noise are not rounded."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from dlm_lightning.lora import Lora
from dlm_lightning.precision import DTYPES
from dlm_lightning.recipes.block_causal import BlockCausal

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


class Watch(BlockCausal):
    """Keeps what each step masks, and the dtype of what it computes."""

    def corrupt(self, batch, pattern):
        copies = super().corrupt(batch, pattern)
        self.seen = [*getattr(self, "seen", []), batch.u_BL, batch.t_BL, *copies[0]]
        return copies

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.loss_dtype, self.default = loss.dtype, torch.tensor(0.0).dtype
        return loss


@pytest.fixture
def fit(source_folder, make_batch, tmp_path):
    def run(precision, **options):
        recipe = Watch(source=str(source_folder()), block_size=4, **options)
        batches = [make_batch([[9, 7], [16]], seed=seed) for seed in range(3)]
        trainer = L.Trainer(
            accelerator="cpu", precision=precision, max_steps=3, default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(recipe, DataLoader(batches, batch_size=None))
        return recipe, trainer

    return run


def test_the_noise_is_bitwise_the_same_under_every_precision(fit, make_batch):
    expected, _ = fit("32-true")
    batch = make_batch([[9, 7], [16]], seed=0)
    assert torch.equal(expected.seen[0], batch.u_BL) and torch.equal(expected.seen[1], batch.t_BL)
    assert not torch.equal(batch.t_BL, batch.t_BL.bfloat16().float())
    for precision in set(DTYPES) - {"32-true"}:
        recipe, trainer = fit(precision)
        assert trainer.precision == precision
        assert len(recipe.seen) == len(expected.seen) == 12
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(recipe.seen, expected.seen, strict=True))


def test_bf16_true_holds_bfloat16_parameters_and_states_and_a_float32_loss(fit, source_folder):
    recipe, trainer = fit("bf16-true", lora=Lora(rank=2), activation_checkpointing=True)
    network = recipe.denoiser.network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    states = [value for state in trainer.optimizers[0].state.values() for key, value in state.items() if key != "step"]
    assert {state.dtype for state in states} == {torch.bfloat16}
    assert recipe.loss_dtype == recipe.default == torch.float32
    buffers = dict(AutoModelForCausalLM.from_pretrained(source_folder()).named_buffers())
    assert buffers and all(torch.equal(network.get_buffer(name), value) for name, value in buffers.items())
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32


def test_bf16_true_starts_from_the_sources_weights_rounded_once(source_folder):
    recipe = BlockCausal(source=str(source_folder()), block_size=4)
    recipe._trainer = L.Trainer(accelerator="cpu", precision="bf16-true", logger=False)
    recipe.configure_model()
    network = AutoModelForCausalLM.from_pretrained(source_folder())
    for name, value in network.named_parameters():
        assert torch.equal(recipe.denoiser.network.get_parameter(name)[: len(value)], value.bfloat16()), name


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_another_precision_is_refused(fit, precision):
    with pytest.raises(ValueError, match=f"trainer.precision must be one of 32-true, .*, not {precision}"):
        fit(precision)
