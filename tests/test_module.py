"""The shared LightningModule: gradients of a mean over tokens, schedule and optimizer, metrics of a validation."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from dlm_lightning import module
from dlm_lightning.noise import NELBO
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.view import Batch, Pattern

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
ROWS = [[16], [5], [9, 7], [3, 2]]  # of very different numbers of maskable tokens: a mean of means would show


def some(batch: Batch, *rows: int) -> Batch:
    return Batch(*(tensor[list(rows)] for tensor in batch))


def gradients(recipe) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in recipe.denoiser.named_parameters()}


def fit(recipe, batches, folder, **options) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(recipe, DataLoader(batches, batch_size=None))
    return trainer


@pytest.fixture
def batch(make_batch):
    return make_batch(ROWS, length=16)


@pytest.fixture
def of_the_mean(batch, loss_and_gradients):
    """`of_the_mean(recipe)`: the loss per maskable token of all rows at once, and its gradients."""

    def compute(recipe):
        copies = recipe.corrupt(batch, recipe.pattern)
        loss, summed = loss_and_gradients(recipe.denoiser, batch, copies, recipe.pattern, recipe.ar_weight)
        tokens = sum(size - 1 for row in ROWS for size in row)
        recipe.zero_grad()
        return loss / tokens, {name: gradient / tokens for name, gradient in summed.items()}

    return compute


# The step


@pytest.mark.parametrize("micro_batches", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]], [[0], [1], [2], [3]]])
def test_a_trainers_gradients_are_those_of_the_mean_over_maskable_tokens(
    make_recipe, batch, of_the_mean, assert_same, tmp_path, micro_batches
):
    recipe = make_recipe(BlockCausal, block_size=4, context_rank="causal", ar_weight=0.5)
    expected = of_the_mean(recipe)
    batches = [some(batch, *rows) for rows in micro_batches]
    trainer = fit(recipe, batches, tmp_path, max_steps=1, accumulate_grad_batches=len(batches))
    assert_same((trainer.callback_metrics["train/loss"].item(), gradients(recipe)), expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_micro_batches_do_not_change_the_gradients(
    make_recipe, batch, of_the_mean, assert_same, monkeypatch, ranks, accumulate
):
    """Each rank's gradients as Lightning and the strategy make them: divided by micro-batches, averaged over ranks."""
    recipe = make_recipe(BlockCausal, block_size=4)
    expected = of_the_mean(recipe)
    rows = torch.arange(4).reshape(ranks, accumulate, -1).tolist()
    logged = {}
    recipe.log = lambda name, value, **_: logged.update({name: float(value)})
    for _ in range(2):  # nothing of a step remains for the next one
        tallies = []
        recipe.zero_grad()
        for rank in range(ranks):
            recipe._tally = None
            recipe._trainer.accumulate_grad_batches, recipe._trainer.world_size = accumulate, ranks
            for micro_batch in rows[rank]:
                (recipe.training_step(some(batch, *micro_batch), 0) / accumulate / ranks).backward()
            tallies.append(recipe._tally)
        monkeypatch.setattr(module, "over_ranks", lambda mine, all=tallies: sum(all))
        recipe.on_before_optimizer_step(torch.optim.AdamW(recipe.parameters(), fused=True))
        recipe._given = None
        assert_same((logged["train/loss"], gradients(recipe)), expected)
        assert recipe._tally is None


def test_gradients_are_clipped_after_the_division(make_recipe, batch, of_the_mean, tmp_path):
    recipe = make_recipe(BlockCausal, block_size=4)
    norm = torch.stack([gradient.norm() for gradient in of_the_mean(recipe)[1].values()]).norm().item()
    for clip, left in ((0.5, 0.5), (2.0, 1.0)):
        recipe = make_recipe(BlockCausal, block_size=4)
        fit(recipe, [batch], tmp_path, max_steps=1, gradient_clip_val=clip * norm)
        clipped = torch.stack([gradient.norm() for gradient in gradients(recipe).values()]).norm().item()
        assert clipped == pytest.approx(left * norm, rel=1e-4)


def test_a_step_without_a_maskable_token_changes_nothing(make_recipe, make_batch, tmp_path):
    recipe = make_recipe(BlockCausal, block_size=4)
    before = {name: value.clone() for name, value in recipe.denoiser.named_parameters()}
    trainer = fit(recipe, [make_batch([[], []], length=8)], tmp_path, max_steps=1)
    assert trainer.callback_metrics["train/loss"] == 0
    assert all(torch.equal(value, before[name]) for name, value in recipe.denoiser.named_parameters())


# The optimizer


class Rates(L.Callback):
    """The learning rates with which each optimizer step is made."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, recipe, optimizer):
        self.steps.append({group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("warmup, floor", [(4, 0.3), (0, 0.0), (5, 1.0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_warms_up_and_falls_by_a_cosine_to_its_floor(
    make_recipe, make_batch, tmp_path, warmup, floor, accumulate
):
    steps, lr = 10, 2e-3
    recipe = make_recipe(ArSource, lr=lr, warmup_steps=warmup, min_lr_ratio=floor)
    rates = Rates()
    batches = [make_batch([[4]])] * steps * accumulate
    trainer = fit(
        recipe, batches, tmp_path, max_steps=steps, accumulate_grad_batches=accumulate, callbacks=[rates], max_epochs=1
    )

    def rate(step: int) -> float:
        if step < warmup:
            return lr * step / warmup
        share = (step - warmup) / (steps - warmup)
        return lr * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)

    assert [len(step) for step in rates.steps] == [1] * steps
    assert [step.pop() for step in rates.steps] == pytest.approx([rate(step) for step in range(steps)], rel=1e-9)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(floor * lr, abs=1e-12)


def test_weight_decay_is_on_matrices_only_and_betas_are_passed_on(make_recipe):
    lr, decay = 0.1, 0.25
    recipe = make_recipe(ArSource, lr=lr, weight_decay=decay, betas=(0.7, 0.8))
    recipe._trainer.max_steps = 5
    optimizer = recipe.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    assert {group["betas"] for group in optimizer.param_groups} == {(0.7, 0.8)}
    before = {name: p.detach().clone() for name, p in recipe.denoiser.named_parameters()}
    for p in recipe.denoiser.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {p.ndim for p in before.values()} == {1, 2}
    for name, p in recipe.denoiser.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - lr * decay if p.ndim == 2 else 1), msg=name)


# The metrics


def test_masked_ce_is_the_plain_mean_over_the_masked_tokens_of_the_nelbo(
    make_recipe, make_batch, plain_logits, validated
):
    recipe = make_recipe(FullBidirectional, shift="none", ar_weight=0.5)  # neither its own noise nor the AR loss is in
    batch = make_batch([[13]], seed=1)
    ids = batch.ids_BL[0]
    mask_L = recipe.draw(NELBO, batch, Pattern(None)).mask_BL[0]
    everything = torch.ones(13, 13, dtype=torch.bool)
    logits = plain_logits(recipe.denoiser, torch.where(mask_L, 300, ids), torch.arange(13), everything)
    logp = logits[:, :300].log_softmax(1)
    terms = [-logp[i, ids[i]].item() for i in range(13) if mask_L[i]]
    assert 1 < len(terms) < 12
    assert validated(recipe, batch)["masked_ce"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("recipe_class", [BlockCausal, ArSource])
def test_a_validation_is_a_mean_over_tokens_and_not_over_batches(make_recipe, batch, validated, recipe_class):
    recipe = make_recipe(recipe_class)
    whole = validated(recipe, batch)
    validated(recipe, some(batch, 0))  # an earlier validation leaves nothing behind
    recipe.on_validation_epoch_start()
    with torch.no_grad():
        for rows in ([0], [1, 2, 3]):
            recipe.validation_step(some(batch, *rows), 0)
    parts = {name: metric.compute().item() for name, metric in recipe.metrics.items() if metric.update_called}
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_nelbo_weighs_masked_tokens_and_divides_by_maskable_ones(make_recipe, batch, validated):
    recipe = make_recipe(BlockCausal, block_size=4, ar_weight=0.5, context_rank="causal")
    [copy] = recipe.nelbo_masks(batch)
    view = recipe.pattern.lay_out(batch, [copy.mask_BL], 300)
    index_N = torch.cat([copy.mask_BL, torch.zeros_like(copy.mask_BL)], 1).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        nll_N = recipe.denoiser(view, index_N, batch.ids_BL[copy.mask_BL])
    total = (nll_N * copy.weight_BL[copy.mask_BL]).sum().item()
    assert validated(recipe, batch)["nelbo"] == pytest.approx(total / batch.maskable_BL.sum().item(), rel=1e-5)
