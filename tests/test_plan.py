"""What a plan says, against formulas, a real step, and a measured run."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning import readout
from dlm_lightning.plan import Plan, plan, rows
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.rehearsal import per_device

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"
B, L, STEPS, VOCABULARY = 4, 24, 6, 301
BATCH = B * L


@pytest.fixture
def planned(small, tmp_path, monkeypatch):
    """`planned(recipe, *words, **overrides)`: the plan of a shipped recipe on the tiny source."""
    monkeypatch.chdir(tmp_path)
    return lambda recipe, *words, **more: plan(recipe, [*small(**more), *words])


@pytest.fixture
def parameters(source_folder):
    """The parameters of the tiny source with one more row, for the mask token."""
    network = AutoModelForCausalLM.from_pretrained(source_folder("qwen3", tied=True))
    return sum(p.numel() for p in network.parameters()) + 32


# Tokens and FLOPs


@pytest.mark.parametrize(
    ("recipe", "copies", "share"),
    [("ar_source", 1, 1), ("full_bidirectional", 1, 0.5), ("block_causal", 2, 0.5), ("complementary_mask", 3, 1)],
)
def test_the_three_counts_of_tokens_are_kept_apart(recipe, copies, share, small, planned):
    none = ["model.config=null", "data.vocab_size=null"] if recipe == "ar_source" else []
    found = planned(recipe, *none).tokens
    assert (found.data, found.forward) == (BATCH, copies * BATCH)
    exact = share == 1
    assert found.scored == pytest.approx(share * B * (L - 1), rel=1e-9 if exact else 0.02)


def test_an_ar_loss_beside_is_counted(planned):
    found = planned("full_bidirectional", "model.ar_weight=0.5").tokens
    assert found.forward == 2 * BATCH
    assert found.scored == pytest.approx(1.5 * B * (L - 1), rel=0.02)


def test_flops_are_those_of_the_matrices_and_of_attention(planned):
    found = planned("block_causal")
    S, scored = 2 * L, round(found.tokens.scored)
    named = found.denoiser.named_parameters()
    matrices = sum(p.numel() for name, p in named if "layers" in name and p.ndim > 1)
    attention = 2 * 2 * B * 4 * S * S * 8 * 2  # two products of four heads of eight numbers in two layers
    head = 2 * scored * 32 * VOCABULARY
    last = sum(p.numel() for p in found.denoiser.network.model.layers[-1].mlp.parameters())
    unread = 2 * (B * S - scored) * last  # tokens that nobody reads leave the last layer without its feed-forward part
    done = found.rehearsal
    assert done.forward == 2 * B * S * matrices + attention + head - unread
    # backward: products twice, and five products of attention for two; no gradient ends at token ids
    assert done.computed == 3 * done.forward + attention // 2


# Memory


def test_weights_gradients_and_moments_are_four_bytes_a_parameter(planned, parameters):
    done = planned("block_causal").rehearsal
    assert done.weights == done.gradients == 4 * parameters
    assert done.optimizer == pytest.approx(8 * parameters, rel=0.001)  # and a step count for each


def test_activations_are_what_autograd_saves(planned, make_recipe):
    """A real step of the same shape: storages saved for the backward pass, each once, parameters left out."""
    found = planned("block_causal").rehearsal
    recipe = make_recipe(BlockCausal)
    batch = rows(B, L)
    copies = recipe.corrupt(batch, recipe.pattern)
    view = recipe.show(batch, copies, recipe.pattern)
    own = {p.untyped_storage().data_ptr() for p in recipe.denoiser.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # kept alive, so that no other takes its place
        return tensor

    scored = round(B * (L - 1) / 2)
    index_N = torch.arange(1, scored + 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        recipe.denoiser(view, index_N, batch.ids_BL.flatten()[:scored], torch.rand(scored))
    head = recipe.denoiser.network.get_output_embeddings().weight
    made = head.nbytes + scored * head.shape[1] * 4  # the head's gradient, and that of what it reads
    expected = made + sum(storage.nbytes() for storage in saved.values())
    shown = sum(tensor.nbytes for tensor in view.coordinates)  # what the pass is shown is alive, too
    assert expected - shown <= found.activations <= expected + 2 * shown
    assert shown < 0.05 * expected


def test_the_peak_is_the_sum_of_its_parts(planned):
    memory = planned("complementary_mask").memory
    assert memory.peak == sum(at_peak for _, at_peak in memory.parts.values())
    assert all(0 <= at_peak <= whole for whole, at_peak in memory.parts.values())


def test_what_malloc_keeps_comes_on_top_and_only_on_cpus(planned):
    cpu, gpu = planned("block_causal"), planned("block_causal", "trainer.accelerator=gpu", "trainer.devices=1")
    assert gpu.rehearsal.allocator == 0 and "freed, kept by malloc" not in gpu.memory.parts
    done = cpu.rehearsal
    alive = done.weights + done.optimizer + max(sum(done.passes), sum(done.update))
    for held, kept in ((0, 0), (alive, 0), (alive + 12345, 12345)):
        memory = per_device(replace(done, allocator=held), "single", 1, cpu.denoiser)
        assert memory.peak == alive + kept


def test_the_head_has_as_many_logits_at_a_time_as_on_the_device_that_is_planned(planned, monkeypatch):
    own, found = readout._at_a_time, []
    monkeypatch.setattr(readout, "_at_a_time", lambda *given: found.append(own(*given)) or found[-1])
    for words, logits in ((), 2**23), (("trainer.accelerator=gpu", "trainer.devices=1"), 2**28), ((), 2**23):
        planned("block_causal", *words)
        assert set(found) == {logits // 301}
        found.clear()


def test_accumulated_gradients_are_there_during_the_passes(planned, parameters):
    several = planned("block_causal", "trainer.accumulate_grad_batches=3")
    assert several.rehearsal.passes.gradients == 4 * parameters
    assert several.memory.peak >= planned("block_causal").memory.peak


def test_mixed_precision_keeps_weights_and_halves_much_of_the_rest(planned, parameters):
    full, mixed = planned("block_causal"), planned("block_causal", "trainer.precision=bf16-mixed")
    assert full.rehearsal.weights == mixed.rehearsal.weights == 4 * parameters
    assert 0.5 < mixed.rehearsal.activations / full.rehearsal.activations < 0.9
    assert mixed.machine.precision == "bf16-mixed"


def test_bf16_true_halves_weights_gradients_and_moments(planned, parameters):
    found = planned("block_causal", "trainer.precision=bf16-true")
    done = found.rehearsal
    assert done.weights == done.gradients == 2 * parameters
    assert done.optimizer == pytest.approx(4 * parameters, rel=0.01)  # and a step count for each
    assert {p.dtype for p in found.denoiser.parameters()} == {torch.bfloat16}
    assert found.machine.precision == "bf16-true"


def test_adapters_leave_the_layers_matrices_without_gradient_and_moments(planned, parameters):
    pytest.importorskip("peft")
    plain, found = planned("block_causal"), planned("block_causal", "model.lora={rank: 8}")
    matrices = sum(p.numel() for name, p in plain.denoiser.named_parameters() if "layers" in name and p.ndim > 1)
    shapes = [p.shape for name, p in plain.denoiser.named_parameters() if "layers" in name and p.ndim > 1]
    adapters = sum(8 * sum(shape) for shape in shapes)  # [8, in] and [out, 8]
    trained = parameters - matrices + adapters
    assert sum(p.numel() for p in found.denoiser.parameters() if p.requires_grad) == trained
    assert found.rehearsal.weights == 4 * (parameters + adapters)
    assert found.rehearsal.gradients == 4 * trained
    assert found.rehearsal.optimizer == pytest.approx(8 * trained, rel=0.01)


FROZEN = """
from dlm_lightning.recipes.block_causal import BlockCausal
class Frozen(BlockCausal):
    def configure_model(self):
        super().configure_model()
        for name, parameter in self.denoiser.network.named_parameters():
            parameter.requires_grad_("layers" not in name)
"""


@pytest.fixture
def of_class(planned, tmp_path, monkeypatch):
    """`of_class(name)`: the plan of `block_causal` with a class of one's own in its place."""
    (tmp_path / "made_up.py").write_text(FROZEN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: planned("block_causal", f"--model={name}")


def test_frozen_parameters_have_neither_gradient_nor_moments(of_class, parameters):
    found = of_class("made_up.Frozen")
    trained = sum(p.numel() for p in found.denoiser.parameters() if p.requires_grad)
    assert 0 < trained < parameters
    assert found.rehearsal.gradients == 4 * trained
    assert found.rehearsal.optimizer == pytest.approx(8 * trained, rel=0.001)


def test_checkpointing_trades_memory_for_flops(planned):
    plain, found = planned("block_causal"), planned("block_causal", "model.activation_checkpointing=true")
    assert found.rehearsal.activations < plain.rehearsal.activations / 2
    unread = found.rehearsal.forward - plain.rehearsal.forward  # the last layer is left whole
    assert 0 < unread < plain.rehearsal.forward / 2
    assert 0 < found.rehearsal.computed - plain.rehearsal.computed - 3 * unread <= found.rehearsal.forward


def test_what_checkpointing_computes_anew_is_there_for_one_layer_at_a_time(planned):
    """So that more layers make no larger peak beside weights, gradients and one kept activation each."""
    shape = "model_type: qwen3, hidden_size: 64, intermediate_size: 256, head_dim: 16, "
    shape += "num_attention_heads: 4, num_key_value_heads: 2"
    words = ["model.source=null", "data.vocab_size=300", "data.batch_size=32", "model.activation_checkpointing=true"]
    few, many = (
        planned("block_causal", *words, f"model.config={{{shape}, num_hidden_layers: {layers}}}").rehearsal
        for layers in (2, 8)
    )
    assert few.activations < many.activations
    again = [found.passes.rest - found.activations for found in (few, many)]
    assert again[1] == pytest.approx(again[0], rel=0.1)


# Machines


def parts(found: Plan) -> dict[str, int]:
    return {name: whole for name, (whole, _) in found.memory.parts.items()}


GPUS = ["trainer.accelerator=gpu", "trainer.devices=4"]


def test_gpus_that_are_not_here_are_planned_for(planned, parameters):
    ddp, fsdp2 = (planned("block_causal", *GPUS, f"trainer.strategy={name}") for name in ("auto", "fsdp2"))
    assert [found.machine.devices for found in (ddp, fsdp2)] == [4, 4]
    assert [found.machine.strategy for found in (ddp, fsdp2)] == ["ddp", "fsdp2"]
    assert parts(ddp)["gradients"] == 2 * parts(ddp)["weights"] == 8 * parameters  # and its buckets
    for name in ("weights", "optimizer state"):
        assert parts(fsdp2)[name] == parts(ddp)[name] // 4
    assert parts(fsdp2)["gradients"] == parameters
    layer = sum(p.numel() for name, p in fsdp2.denoiser.named_parameters() if "layers.0." in name)
    outside = parameters - 2 * layer
    assert parts(fsdp2)["gathered by FSDP2"] == 4 * (2 * outside + 3 * layer)


def test_nodes_and_lists_of_devices_are_counted(planned):
    def devices(*words: str) -> int:
        return planned("block_causal", *words).machine.devices

    assert devices("trainer.devices=[0,3]", "trainer.num_nodes=2") == 4
    assert devices("--trainer.devices=3", "trainer.strategy=ddp") == 3


def test_a_source_needs_no_weights_and_nothing_is_written(source_folder, typed, small, tmp_path):
    folder = shutil.copytree(source_folder("qwen3", tied=True), tmp_path / "source")
    (folder / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    said = typed("plan", "block_causal", *small(model__source=folder), cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    lines = {line.split("  ")[0].strip(): line for line in said.out.splitlines()}
    assert lines["data tokens, of the corpus"].split()[-3:] == ["96", "96", "576"]
    assert lines["forward tokens, computed"].split()[-4:] == ["192", "192", "1.15", "k"]
    assert "fits into" in said.out.splitlines()[-1]


def test_without_a_source_the_vocabulary_is_the_datas(planned):
    found = plan("ar_source", [])
    assert found.denoiser.network.config.vocab_size == 2048 + 1


# Bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ar_source", "data.vocab_size=null"], "data.vocab_size must be set"),
        (["block_causal", "data.vocab_size=99", "model.source={source}"], "data.vocab_size must be null"),
        (["block_causal", "trainer.max_steps=-1", "model.source={source}"], "trainer.max_steps must be set"),
        (["block_causal", "trainer.devices=0"], "trainer.devices must be"),
        (["block_causal", "trainer.devices=many"], "trainer.devices must be"),
        (["block_causal", "model.source=nowhere"], "model.source: there is no folder nowhere"),
        (["block_causal", "model.block_sise=3"], "block_sise"),
        (["blok_causal"], "did you mean block_causal?"),
        (
            ["ar_source", "model.config.num_hidden_layers=0", "trainer.devices=2", "trainer.strategy=fsdp2"],
            "names no decoder layers",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, says, refused, source_folder, tmp_path):
    assert says in refused("plan", *(word.format(source=source_folder()) for word in words), cwd=tmp_path)


# Measured


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full_bidirectional", "block_causal", "complementary_mask"])
def test_the_peak_is_within_15_percent_of_a_measured_run(recipe):
    spec = importlib.util.spec_from_file_location("memory", BENCHMARK)
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    assert sum(p.numel() for p in plan(recipe, memory.WORDS).denoiser.parameters()) > 50e6
    measured, _ = memory.measured(recipe, memory.WORDS)
    assert 500e6 < measured < 3e9
    assert memory.planned(recipe, memory.WORDS) == pytest.approx(measured, rel=0.15)
