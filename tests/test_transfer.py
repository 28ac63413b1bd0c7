"""What waits for a device: nothing in a step. On fake tensors, which have no values, any look at one is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from dlm_lightning.attention import flash, flex
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.transfer import Fetched, send
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, View, sees

LOOKS = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture
def batch(make_batch):
    return make_batch([[9, 7], [13], [5, 5], []], length=16, prompts={(1, 0): 4})


def without_values(network: nn.Module, fake: FakeTensorMode) -> None:
    """Put fake tensors in the place of a network's parameters and buffers."""
    known: dict[int, Any] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    other = fake.from_tensor(tensor.detach())
                    known[id(tensor)] = nn.Parameter(other) if tensors is module._parameters else other
                tensors[name] = known[id(tensor)]


def on_the_host(function):
    """What is done with real tensors, under a fake mode too."""

    def run(*args, **options):
        with unset_fake_temporarily():
            return function(*args, **options)

    return run


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_looks_at_no_value_before_it_is_made(precision, any_recipe, batch, monkeypatch):
    recipe = any_recipe(attention="dense")
    recipe._trainer.max_steps = 10
    recipe.shown = on_the_host(recipe.shown)
    monkeypatch.setattr(View, "to", on_the_host(View.to))
    logged = {}
    recipe.log = lambda name, value, **_: logged.update({name: value})
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        without_values(recipe.denoiser, fake)
        optimizer = recipe.configure_optimizers()["optimizer"]
        for _ in range(2):  # a micro-batch each
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = recipe.training_step(batch, 0)
            loss.backward()
        recipe.on_before_optimizer_step(optimizer)
        torch.nn.utils.clip_grad_norm_(recipe.denoiser.parameters(), 1.0)
        optimizer.step()
        assert {"train/loss", "train/grad_norm"} <= {*logged}
        with pytest.raises(LOOKS):
            logged["train/loss"].item()
        with pytest.raises(LOOKS):
            recipe.settle()


def test_a_host_that_would_ask_for_what_is_scored_is_found_out(make_recipe, batch):
    """The step above is not free of looks because nobody would notice."""
    recipe = make_recipe(BlockCausal, block_size=4, attention="dense")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises(LOOKS):
        without_values(recipe.denoiser, fake)
        recipe.training_step(batch, 0)


@pytest.mark.parametrize("window", [None, 4])
def test_a_block_mask_is_built_without_a_look(batch, window):
    view = Pattern(4, "clean").lay_out(batch, [batch.maskable_BL], 300)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        faked = View(*(fake.from_tensor(tensor) for tensor in view.coordinates))
        assert flex.block_mask(faked, sees, window).kv_num_blocks.shape == (4, 1, 1)


@pytest.mark.parametrize("pattern", [Pattern(None), AUTOREGRESSIVE], ids=["full", "causal"])
def test_a_view_from_the_host_brings_where_its_documents_start(pattern, batch, monkeypatch):
    view = pattern.lay_out(batch, [batch.maskable_BL] if pattern.block_size is None else [], 300)
    sent = view.to(torch.device("cpu"))
    edges = [0, 9, 16, 29, 30, 31, 32, 37, 42, *range(43, 49), *range(49, 65)]  # padding is one by one
    assert sent.starts.tolist() == edges and sent.starts.dtype == torch.int32
    monkeypatch.setattr(flash, "_applies", lambda *_: True)
    monkeypatch.setattr(flash, "kernel", lambda: print)
    assert flash.plan(sent, sees).starts is sent.starts
    assert flash.plan(view, sees).starts.tolist() == edges


def test_views_of_which_nothing_is_known_bring_no_starts(batch):
    view = Pattern(4, "clean").lay_out(batch, [batch.maskable_BL], 300)
    assert view.to(torch.device("cpu")).starts is None


def test_an_optimizer_that_cannot_leave_out_a_step_is_refused(make_recipe, batch):
    recipe = make_recipe(BlockCausal, block_size=4)
    recipe.log = lambda *_, **__: None
    recipe.training_step(batch, 0).backward()
    optimizer = torch.optim.SGD(recipe.denoiser.parameters(), lr=1.0)
    with pytest.raises(TypeError, match="SGD cannot leave out a step that is not finite; it needs fused=True"):
        recipe.on_before_optimizer_step(optimizer)


def test_what_is_sent_and_fetched_is_what_it_was():
    tensor = torch.rand(3)
    assert torch.equal(send(tensor, torch.device("cpu")), tensor)
    assert torch.equal(Fetched(tensor).read(), tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing(any_recipe, make_batch):
    """By torch's own watch over what makes the host wait; what was compiled or allocated is there by the third step."""
    recipe = any_recipe()
    recipe._trainer.max_steps = 10
    recipe.cuda()
    logged = {}
    recipe.log = lambda name, value, **_: logged.update({name: value})
    optimizer = recipe.configure_optimizers()["optimizer"]
    rows = [make_batch([[700, 324], [512, 512]], length=1024, seed=n) for n in range(3)]
    try:
        for n, batch in enumerate(rows):
            torch.cuda.set_sync_debug_mode("error" if n == 2 else "default")
            with torch.autocast("cuda", torch.bfloat16):
                loss = recipe.training_step(batch, 0)
            loss.backward()
            recipe.on_before_optimizer_step(optimizer)
            torch.nn.utils.clip_grad_norm_(recipe.denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logged["train/loss"].isfinite() and recipe._looked_at["train/loss"] > 0
