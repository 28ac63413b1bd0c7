"""LoRA: a start that changes nothing, what is trained, names and merged weights, drift, decoding and resuming."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning import lora
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import Nothing, Prefix
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.drift import measure
from dlm_lightning.lora import Lora
from dlm_lightning.noise import NELBO
from dlm_lightning.source import Source
from dlm_lightning.view import Pattern

FAMILIES = pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), ("qwen3", False), ("phi3", False), ("gpt2", True)]
)
PATTERN = Pattern(block_size=4, context="clean")
LINEAR = {  # those of a layer
    "qwen3": [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}


def adapted(denoiser, options=Lora(rank=3, alpha=6.0)):
    lora.adapt(denoiser.network, options)
    lora.start(denoiser.network)
    return denoiser


@torch.no_grad()
def move(denoiser, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return denoiser


def logits(denoiser, batch):
    view = PATTERN.lay_out(batch, [batch.maskable_BL], denoiser.mask_id)
    return denoiser(view, batch.maskable_BL.flatten().nonzero().squeeze(1))


@FAMILIES
def test_at_the_start_the_network_is_the_source_bit_for_bit(make_denoiser, make_batch, family, tied):
    batch = make_batch([[9, 7]])
    plain = make_denoiser(family, tied)
    before = logits(plain, batch)
    assert torch.equal(logits(adapted(make_denoiser(family, tied)), batch), before)


@FAMILIES
def test_linear_layers_are_adapted_and_frozen_and_everything_else_is_trained(make_denoiser, family, tied):
    plain = {name for name, _ in make_denoiser(family, tied).network.named_parameters()}
    network = adapted(make_denoiser(family, tied)).network
    layers = {
        f"{'transformer.h' if family == 'gpt2' else 'model.layers'}.{n}.{x}" for n in (0, 1) for x in LINEAR[family]
    }
    frozen = {lora.plain(name) for name, p in network.named_parameters() if not p.requires_grad}
    assert {name.rpartition(".")[0] for name in frozen} == layers
    assert {name for name, _ in lora.named_parameters(network)} == plain
    own = {name: p for name, p in network.named_parameters() if ".lora_" in name}
    assert {lora.plain(name) for name in own} == {f"{layer}.weight" for layer in layers}
    assert all(p.requires_grad and 3 in p.shape for p in own.values())
    assert type(network) is type(make_denoiser(family, tied).network)


def test_targets_are_patterns(make_denoiser):
    network = adapted(make_denoiser(), Lora(targets=["*.q_proj", "model.layers.1.mlp.*"])).network
    found = {lora.plain(name) for name, _ in network.named_parameters() if ".lora_" in name}
    expected = {"0.self_attn.q_proj", "1.self_attn.q_proj", *(f"1.mlp.{x}_proj" for x in ("gate", "up", "down"))}
    assert found == {f"model.layers.{name}.weight" for name in expected}


@pytest.mark.parametrize("pattern", ["*.qproj", "lm_head", "*norm*"])
def test_a_target_that_is_no_linear_layer_is_refused_by_name(make_denoiser, pattern):
    with pytest.raises(ValueError) as error:
        lora.adapt(make_denoiser().network, Lora(targets=["*.q_proj", pattern]))
    assert str(error.value).startswith(f"model.lora.targets: {pattern} matches no linear layer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"alpha": 0.0}, "alpha must"),
        ({"targets": []}, "targets: give"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=f"model.lora.{message}"):
        Lora(**options)


def test_without_peft_one_sentence_names_the_extra(make_denoiser, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError) as error:
        lora.adapt(make_denoiser().network, Lora())
    assert str(error.value) == "model.lora needs peft: pip install 'dlm_lightning[lora]'"


def test_the_start_depends_on_seed_and_name_and_on_nothing_drawn_before(make_denoiser):
    def factors(seed, draws=0):
        torch.manual_seed(seed)
        torch.rand(draws)
        network = adapted(make_denoiser()).network
        return {name: p.detach() for name, p in network.named_parameters() if ".lora_" in name}

    first, again, other = factors(1), factors(1, draws=5), factors(2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if ".lora_A." in name:
            assert not torch.equal(value, other[name])
            bound = 1 / math.sqrt(value.shape[1])  # kaiming-uniform with a = √5, as nn.Linear's
            assert value.abs().max() <= bound and value.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
        else:
            assert (value == 0).all()
    q = "model.layers.{}.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(first[q.format(0)], first[q.format(1)])


@FAMILIES
def test_merged_weights_are_plain_and_give_equal_logits(make_denoiser, make_batch, family, tied, tmp_path):
    batch = make_batch([[9, 7]])
    denoiser = move(adapted(make_denoiser(family, tied)))
    expected = logits(denoiser, batch)
    weights = lora.merged(denoiser.network, {n: w.clone() for n, w in denoiser.network.state_dict().items()})
    denoiser.network.save_pretrained(tmp_path, state_dict=weights)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    plain = make_denoiser(family, tied)
    untouched = logits(plain, batch)
    plain.network.load_state_dict(loaded.state_dict())
    finite = expected.isfinite()
    torch.testing.assert_close(logits(plain, batch)[finite], expected[finite], rtol=1e-4, atol=1e-4)
    assert (untouched[finite] - expected[finite]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_drift_is_that_of_the_merged_weights(make_denoiser, source_folder, family):
    source = Source(str(source_folder(family)))
    denoiser = move(adapted(make_denoiser(family)))
    plain = make_denoiser(family).network
    plain.load_state_dict(lora.merged(denoiser.network, denoiser.network.state_dict()))
    expected, found = measure(plain, source), measure(denoiser.network, source)
    assert [drift.name for drift in found] == [drift.name for drift in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.metrics == pytest.approx(theirs.metrics, rel=1e-4), mine.name
        assert mine.metrics["mean_abs"] > 0
    assert all(drift.metrics["mean_abs"] == 0 for drift in measure(adapted(make_denoiser(family)).network, source))


def test_rows_of_an_update_are_those_of_the_whole(make_denoiser):
    network = move(adapted(make_denoiser("gpt2", True))).network
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        layer = network.get_submodule(name.removesuffix(".weight"))
        found = lora.update(network, name)
        delta_RC = layer.get_delta_weight("default").detach()
        assert delta_RC.shape == layer.base_layer.weight.shape
        torch.testing.assert_close(found.rows(0, len(delta_RC)), delta_RC)
        torch.testing.assert_close(found.rows(5, 9), delta_RC[5:9])
    assert lora.update(network, "transformer.wte.weight") is None
    assert lora.update(network, "transformer.h.0.attn.c_attn.bias") is None


def test_decoding_works_with_adapters(make_denoiser):
    denoiser = move(adapted(make_denoiser(pattern=PATTERN)))
    cached, plain = (
        decode(denoiser, [[1, 2, 3]], Plan(cache=cache, stopper=Stopper(9))) for cache in (Prefix(), Nothing())
    )
    assert cached.rows[0].ids == plain.rows[0].ids and cached.cached_share > 0


def test_gradients_reach_the_factors_as_those_of_the_product(make_denoiser, make_batch, loss_and_gradients):
    """dL/dB = s · dL/dW · Aᵀ and dL/dA = s · Bᵀ · dL/dW, with dL/dW of the merged network."""
    batch = make_batch([[9, 7]])
    masked = NELBO.draw(batch.u_BL, batch.t_BL, batch.maskable_BL, *[torch.zeros_like(batch.ids_BL)] * 2)
    denoiser = move(adapted(make_denoiser()))
    plain = make_denoiser()
    plain.network.load_state_dict(lora.merged(denoiser.network, denoiser.network.state_dict()))
    _, expected = loss_and_gradients(plain, batch, [masked], PATTERN)
    masks = [masked.mask_BL]
    view = PATTERN.lay_out(batch, masks, denoiser.mask_id)
    index_N = torch.cat([masked.mask_BL, torch.zeros_like(masked.mask_BL)], 1).flatten().nonzero().squeeze(1)
    nll_N = denoiser(view, index_N, batch.ids_BL[masked.mask_BL])
    (nll_N * masked.weight_BL[masked.mask_BL]).sum().backward()
    name = "model.layers.0.mlp.up_proj"
    layer = denoiser.network.get_submodule(name)
    A_KC, B_RK = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    grad_RC = expected[f"network.{name}.weight"]
    torch.testing.assert_close(B_RK.grad, 2.0 * grad_RC @ A_KC.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(A_KC.grad, 2.0 * B_RK.T @ grad_RC, rtol=1e-3, atol=1e-4)
    assert layer.base_layer.weight.grad is None
