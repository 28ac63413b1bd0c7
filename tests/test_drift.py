import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dlm_lightning.drift import METRICS, by_group, measure, place, pool, rows
from dlm_lightning.source import Source

SIZES = dict(
    hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
)


def network_and_source(folder, model_type="qwen3", tied=True, vocab_size=50):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, tie_word_embeddings=tied, **SIZES)
    network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(folder)
    return network, Source(str(folder))


@torch.no_grad()
def move(network, scale=1e-3):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return network


def one_parameter(folder, before, after):
    """The drift of a network of one parameter, from `before` to `after`."""
    AutoConfig.for_model("qwen3", **SIZES).save_pretrained(folder)
    save_file({"weight": before.contiguous()}, folder / "model.safetensors")
    network = nn.Module()
    network.weight = nn.Parameter(after)
    return measure(network, Source(str(folder)))[0]


def expected(after, before):
    """The definitions, written with whole tensors in double precision."""
    after, before = after.detach().double(), before.double()
    delta = after - before
    values = {
        "mean_abs": delta.abs().mean(),
        "rel_fro": delta.norm() / before.norm(),
        "cosine": torch.cosine_similarity(after.flatten(), before.flatten(), dim=0),
        "w1": (after.flatten().sort().values - before.flatten().sort().values).abs().mean(),
    }
    if after.ndim == 2:
        values["stable_rank"] = delta.norm() ** 2 / torch.linalg.svdvals(delta)[0] ** 2
    return {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_metrics_equal_their_definitions(tmp_path, model_type):
    network, source = network_and_source(tmp_path, model_type)
    drifts = {drift.name: drift for drift in measure(move(network), source)}
    assert drifts.keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        wanted, metrics = expected(parameter, source.read(name)), drifts[name].metrics
        assert metrics.keys() == wanted.keys() and set(wanted) <= set(METRICS)
        for metric in ("mean_abs", "rel_fro"):
            assert metrics[metric] == pytest.approx(wanted[metric], rel=1e-5)
        assert 1 - metrics["cosine"] == pytest.approx(1 - wanted["cosine"], rel=1e-4)
        if parameter.ndim == 2:
            assert metrics["stable_rank"] == pytest.approx(wanted["stable_rank"], rel=1e-2)
        assert drifts[name].numel == parameter.numel()


def test_cosine_is_exact_where_its_distance_from_one_is_below_single_precision(tmp_path):
    before = torch.randn(64, 64)
    after = before + 1e-5 * torch.randn(64, 64)
    metrics = one_parameter(tmp_path, before, after).metrics
    assert 1 - metrics["cosine"] == pytest.approx(1 - expected(after, before)["cosine"], rel=1e-3)


def sorted_w1(after, before):
    after, before = (np.sort(values.detach().double().numpy().ravel()) for values in (after, before))
    return np.abs(after - before).mean()


def distributions():
    """{name: (W0, W)}, among them what earlier estimates missed: drift below a bin's width, and far outliers."""
    torch.manual_seed(0)
    gaussian, noise = 0.02 * torch.randn(128, 192), 0.02 * torch.randn(128, 192)
    sources = {
        "gaussian": gaussian,
        "bfloat16": gaussian.bfloat16().float(),
        "student": 0.02 * torch.distributions.StudentT(3.0).sample((128, 192)),
        "cauchy": 0.02 * torch.distributions.Cauchy(0.0, 1.0).sample((128, 192)),
        "constant": torch.full((128, 192), 0.5),
        "small": gaussian[:8, :8],
    }
    for name, values in {"outlier": [20.0], "outliers": [20.0, -20, 5, 3, 1, 200, -7, 2]}.items():
        sources[name] = sources["bfloat16"].clone()
        sources[name][3, : len(values)] = torch.tensor(values)
    moved = {
        f"{name} {relative:g}": (before, before + relative * noise[: len(before), : before.shape[1]])
        for name, before in sources.items()
        for relative in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    }
    return moved | {
        "wider": (gaussian, 1.1 * gaussian),
        "shifted": (gaussian, gaussian + 1e-3),
        "no source": (torch.zeros(128, 192), gaussian),
    }


@pytest.mark.parametrize("name", distributions())
def test_w1_of_histograms_equals_that_of_sorted_values(tmp_path, name):
    before, after = distributions()[name]
    metrics = one_parameter(tmp_path, before, after).metrics
    assert metrics["w1"] == pytest.approx(sorted_w1(after, before), rel=0.05)
    assert metrics["w1"] <= metrics["mean_abs"]


@pytest.mark.parametrize(("numel", "largest", "scale"), [(1536, 10.0, 1e-5), (256, 200.0, 1e-4), (64, 0.02, 1e-3)])
def test_w1_of_a_vector_is_exact(tmp_path, numel, largest, scale):
    generator = torch.Generator().manual_seed(0)
    before_N = torch.randn(numel, generator=generator).bfloat16().float()
    before_N[5] = largest
    after_N = before_N + scale * torch.randn(numel, generator=generator)
    metrics = one_parameter(tmp_path, before_N, after_N).metrics
    assert metrics["w1"] == pytest.approx(sorted_w1(after_N, before_N), rel=1e-6)
    assert metrics["w1"] <= metrics["mean_abs"]


def test_w1_sees_values_and_not_their_places(tmp_path):
    before = torch.randn(64, 48)
    metrics = one_parameter(tmp_path, before, before.flip(0)).metrics
    assert metrics["w1"] < 1e-6 and metrics["mean_abs"] > 0.5


@pytest.mark.parametrize(
    "delta",
    [
        torch.outer(torch.linspace(-1, 2, 30), torch.linspace(1, 3, 20)),
        1e-6 * torch.eye(25),
        torch.randn(300, 60, generator=torch.Generator().manual_seed(0)),
        torch.randn(60, 300, generator=torch.Generator().manual_seed(0)),
        torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).sign() * 1e-4,
        torch.randn(1, 40, generator=torch.Generator().manual_seed(0)),
        torch.randn(40, 1, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["rank-one", "identity", "tall", "wide", "signs", "row", "column"],
)
def test_stable_rank_equals_svd(tmp_path, delta):
    drift = one_parameter(tmp_path, torch.zeros_like(delta), delta)
    wanted = (delta.norm() ** 2 / torch.linalg.matrix_norm(delta, 2) ** 2).item()
    assert drift.stable_rank == pytest.approx(wanted, rel=1e-2)


def test_no_drift(tmp_path):
    network, source = network_and_source(tmp_path)
    for drift in measure(network, source):
        zero = {"mean_abs": 0, "rel_fro": 0, "cosine": 1, "w1": 0}
        assert drift.metrics == zero | ({"stable_rank": 0} if drift.stable_rank is not None else {})


def test_a_source_of_zeros_has_no_relative_drift(tmp_path):
    metrics = one_parameter(tmp_path, torch.zeros(4, 4), torch.ones(4, 4)).metrics
    assert metrics["rel_fro"] == math.inf and metrics["cosine"] == 0 and metrics["mean_abs"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_network_is_measured_too(tmp_path, value):
    network, source = network_and_source(tmp_path)
    network.model.layers[0].self_attn.q_proj.weight.data[0, :2] = torch.tensor([value, -value])
    groups = by_group(measure(network, source))
    assert not any(math.isfinite(groups["q"][metric]) for metric in METRICS)
    assert groups["k"]["rel_fro"] == 0


def test_bfloat16_is_compared_in_single_precision(tmp_path):
    network, source = network_and_source(tmp_path)
    drifts = measure(move(network).to(torch.bfloat16), source)
    for drift in drifts:
        wanted = expected(network.get_parameter(drift.name), source.read(drift.name))
        assert drift.metrics["mean_abs"] == pytest.approx(wanted["mean_abs"], rel=1e-5)
        assert drift.metrics["w1"] == pytest.approx(wanted["w1"], rel=0.05)


def test_added_rows_are_left_out(tmp_path):
    network, source = network_and_source(tmp_path)
    plain = by_group(measure(move(network), source))["embedding"]
    network.resize_token_embeddings(53, mean_resizing=False)
    network.get_input_embeddings().weight.data[50:] = 100.0
    [drift] = [drift for drift in measure(network, source) if drift.group == "embedding"]
    assert drift.numel == 50 * SIZES["hidden_size"]
    assert drift.metrics == plain


def test_parameters_unknown_to_the_source_are_skipped(tmp_path):
    network, source = network_and_source(tmp_path)
    network.extra = nn.Linear(3, 3)
    assert not [drift.name for drift in measure(network, source) if "extra" in drift.name]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(tmp_path, tied):
    groups = by_group(measure(*network_and_source(tmp_path, tied=tied)))
    assert "embedding" in groups
    assert ("head" in groups) == (not tied)


def test_slices_of_rows_change_nothing(tmp_path, monkeypatch):
    network, source = network_and_source(tmp_path)
    whole = measure(move(network), source)
    monkeypatch.setattr("dlm_lightning.drift.SLICE", 48)
    for a, b in zip(whole, measure(network, source), strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-6)


def test_groups_equal_direct_computation_on_concatenated_values(tmp_path):
    network, source = network_and_source(tmp_path, tied=False)
    drifts = measure(move(network), source)
    groups = by_group(drifts)
    assert set(groups) == {"embedding", "q", "k", "v", "o", "gate", "up", "down", "norm", "head"}
    for group, metrics in groups.items():
        members = [drift.name for drift in drifts if drift.group == group]
        after = torch.cat([network.get_parameter(name).detach().flatten() for name in members])
        wanted = expected(after, torch.cat([source.read(name).flatten() for name in members]))
        for metric in ("mean_abs", "rel_fro", "cosine"):
            assert metrics[metric] == pytest.approx(wanted[metric], rel=1e-5)
        each = [(drift.metrics["w1"], drift.numel) for drift in drifts if drift.group == group]
        assert metrics["w1"] == pytest.approx(sum(w1 * n for w1, n in each) / sum(n for _, n in each))
        assert metrics["w1"] <= metrics["mean_abs"]
    two = [drift.stable_rank for drift in drifts if drift.group == "q"]
    assert len(two) == 2 and groups["q"]["stable_rank"] == pytest.approx(sum(two) / 2)
    assert "stable_rank" not in groups["norm"]


def test_rows_are_tidy_with_groups_after_parameters(tmp_path):
    drifts = measure(*network_and_source(tmp_path))
    table = rows(drifts)
    named = [row for row in table if row.name is not None]
    assert len({(row.name, row.metric) for row in named}) == len(named) == sum(len(d.metrics) for d in drifts)
    [q] = [row for row in table if row.name is None and (row.group, row.metric) == ("q", "rel_fro")]
    assert q.layer is None and q.numel == 2 * 16 * 16
    assert q.value == pool(drift for drift in drifts if drift.group == "q")["rel_fro"]


@pytest.mark.parametrize(
    ("name", "layer", "group"),
    [
        ("model.embed_tokens.weight", None, "embedding"),
        ("lm_head.weight", None, "head"),
        ("model.norm.weight", None, "norm"),
        ("model.layers.11.input_layernorm.weight", 11, "norm"),
        ("model.layers.0.self_attn.q_norm.weight", 0, "norm"),
        ("model.layers.0.self_attn.q_proj.bias", 0, "q"),
        ("model.layers.3.self_attn.qkv_proj.weight", 3, "qkv"),
        ("model.layers.3.mlp.gate_up_proj.weight", 3, "gate_up"),
        ("model.layers.3.mlp.gate_proj.weight", 3, "gate"),
        ("model.layers.3.mlp.router.weight", 3, "other"),
    ],
)
def test_place(name, layer, group):
    assert place(name) == (layer, group)


SHARDED = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from dlm_lightning.drift import measure
from dlm_lightning.source import Source

def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    network = AutoModelForCausalLM.from_pretrained(f"{folder}/moved")
    mesh = init_device_mesh("cpu", (2,))
    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    torch.save(measure(network, Source(f"{folder}/source")), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_sharded_equals_whole(tmp_path):
    # 51 rows in the source and 53 in the network: ranks hold 27 and 26 rows, the second one two that are not compared
    network, source = network_and_source(tmp_path / "source", tied=False, vocab_size=51)
    network.resize_token_embeddings(53, mean_resizing=False)
    move(network).save_pretrained(tmp_path / "moved")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    whole = measure(network, source)
    for rank in range(2):
        sharded = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert [(d.name, d.numel) for d in sharded] == [(d.name, d.numel) for d in whole]
        for a, b in zip(sharded, whole, strict=True):
            assert a.metrics == pytest.approx(b.metrics, rel=1e-6), a.name


def test_lightning_is_nowhere_below():
    text = (Path(__file__).parents[1] / "dlm_lightning" / "drift.py").read_text()
    assert not re.search(r"^\s*(from|import) lightning", text, re.MULTILINE)
