"""Tokens per second by a clock that the test turns."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from dlm_lightning.callbacks import throughput
from dlm_lightning.callbacks.throughput import Throughput
from dlm_lightning.flops import needed
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.view import attention_mask

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
ROWS = [[16], [9, 7], [5], [12], [3, 2], [16], [7], [8, 8]]  # one a micro-batch, padded to 16


class Kept(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step + 1, {}).update(metrics)


class Passing(L.Callback):
    """Two seconds a batch, and much time in everything that does not count."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, *_):
        self.clock.now += 2.0

    def on_validation_end(self, *_):
        self.clock.now += 1000.0

    def on_save_checkpoint(self, *_):
        self.clock.now += 500.0


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=7.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def run(make_recipe, make_batch, clock, tmp_path):
    """`run(accumulate, every)`: the rows logged by a run on ROWS that validates and saves on the way."""

    def run(accumulate: int, every: int, **options):
        recipe = make_recipe(BlockCausal, block_size=4, **options)
        batches = [make_batch([row], length=16, seed=n) for n, row in enumerate(ROWS)]
        kept, saver = Kept(), L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
        trainer = L.Trainer(
            accelerator="cpu", logger=kept, callbacks=[Throughput(), Passing(clock), saver], val_check_interval=3,
            max_steps=len(ROWS) // accumulate, max_epochs=1, accumulate_grad_batches=accumulate, num_sanity_val_steps=0,
            log_every_n_steps=every, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        recipe.facts = dict
        trainer.fit(recipe, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
        return kept.rows, recipe, batches, trainer

    return run


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_tokens_per_second_are_counts_over_the_training_time_since_the_last_row(run, accumulate, every):
    rows, recipe, batches, _ = run(accumulate, every)
    size = accumulate * every
    for window in range(len(ROWS) // size):
        mine = slice(window * size, (window + 1) * size)
        data = sum(map(sum, ROWS[mine]))
        scored = sum(int(recipe.corrupt(b, recipe.pattern)[0].mask_BL.sum()) for b in batches[mine])
        row = rows[(window + 1) * every]
        found = [row[f"speed/{kind}_tokens_per_second"] for kind in ("data", "scored", "forward")]
        assert found == pytest.approx([n / (2.0 * size) for n in (data, scored, size * 32)])
    assert not any("mfu" in name for row in rows.values() for name in row), "the peak of a CPU is not known"


def test_the_progress_bar_has_tokens_per_second_and_no_logger_has_them_twice(run):
    rows, _, _, trainer = run(1, 1)
    bar = trainer.progress_bar_metrics
    before = rows[len(ROWS) - 1]  # the last step's own are still on their way
    assert bar["tokens/s"] == pytest.approx(before["speed/data_tokens_per_second"])
    assert bar["loss"] == pytest.approx(before["train/loss"])
    assert all("tokens/s" not in row and "loss" not in row for row in rows.values())


def test_mfu_is_three_forward_passes_over_the_peak(run, monkeypatch):
    peak = 1e9
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: peak)
    rows, recipe, batches, _ = run(2, 1)
    masked, view, _ = recipe.shown(batches[0], recipe.pattern)
    S, scored, seen = 32, int(masked[0].mask_BL.sum()), int(attention_mask(view).sum())
    matrices = sum(p.numel() for name, p in recipe.denoiser.named_parameters() if "layers" in name and p.ndim > 1)
    attention = 2 * 2 * 4 * seen * 8 * 2  # two products of four heads of eight numbers in two layers
    forward = 2 * S * matrices + attention + 2 * scored * 32 * recipe.denoiser.network.config.vocab_size
    last = sum(p.numel() for p in recipe.denoiser.network.model.layers[-1].mlp.parameters())
    forward -= 2 * (S - scored) * last  # tokens that nobody reads leave the last layer without its feed-forward part
    assert [row["speed/mfu"] for row in rows.values()] == pytest.approx([3 * forward / 2.0 / peak] * 4)


def test_what_is_counted_does_not_leave_layers_uncompiled(run, monkeypatch, graphs):
    found = {}
    for peak in (None, 1e9):
        monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: peak)  # noqa: B023
        run(1, 1, compile=True)
        found[peak] = len(graphs)
        graphs.clear()
        torch._dynamo.reset()
    assert found[None] == found[1e9] > 0


def test_frozen_weights_need_no_gradient_of_their_own():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    assert needed(100, network) == 300
    network[0].requires_grad_(False)
    assert needed(100, network) == 250


def test_it_holds_no_state():
    assert Throughput().state_dict() == {}


def test_peak_memory_is_that_of_this_process():
    """What is held now at least, and it grows with what is held."""
    before = throughput.peak_memory(torch.device("cpu"))
    held = torch.ones(40 * 2**20)  # of 160 MiB, written to
    after = throughput.peak_memory(torch.device("cpu"))
    assert after >= held.numel() * 4 and after >= before > 2**26
