"""Weight drift: how far a network has moved from its AR source, read from the source's files and never loaded whole.

Shapes: R rows of a parameter that this process holds and the source has, C columns (all other dimensions), N numbers
of a slice of rows. Parameters sharded by FSDP2 are measured shard by shard; the sums are added over the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dlm_lightning.source import Source

METRICS = ("mean_abs", "rel_fro", "cosine", "w1", "stable_rank")
GROUPS = {
    **{f"{name}_proj": name for name in ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")},
    "embed_tokens": "embedding",
    "lm_head": "head",
}
BINS = 1 << 15  # of the histograms behind w1
POWERS = 20  # products with ΔWᵀΔW per spectral norm
SLICE = 1 << 20  # numbers of the source in memory at a time

AllReduce = Callable[[Tensor, dist.ReduceOp.RedOpType], Tensor]


class Row(NamedTuple):
    """One number of the tidy table; `name` is None for a whole group, `layer` is None outside the layers."""

    name: str | None
    layer: int | None
    group: str
    metric: str
    value: float
    numel: int


@dataclass(frozen=True)
class Drift:
    """The drift of one parameter, as sums that can be pooled over parameters.

    numel: how many numbers were compared. absolute: Σ|ΔW|. square: ΣΔW². source_square: ΣW0². product: ΣΔW·W0.
    w1: Wasserstein-1 distance between the distributions of the values of W and W0. stable_rank: ‖ΔW‖_F²/‖ΔW‖_2², 0
    without drift; None for a parameter that is no matrix.
    """

    name: str
    layer: int | None
    group: str
    numel: int
    absolute: float
    square: float
    source_square: float
    product: float
    w1: float
    stable_rank: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of this parameter alone."""
        return pool([self])


def measure(network: nn.Module, source: Source) -> list[Drift]:
    """The drift of each parameter that the source has under the same name; all ranks call it together under FSDP2.

    Rows that the source lacks (an added mask token) are left out; tied weights are one parameter, the embedding.
    """
    return [_drift(name, parameter, source) for name, parameter in network.named_parameters() if name in source]


def place(name: str) -> tuple[int | None, str]:
    """The layer (None outside the layers) and the group of a parameter's name: a bias belongs to its projection."""
    layer = re.search(r"\.(\d+)\.", name)
    parts = name.split(".")
    known = [GROUPS[part] for part in reversed(parts) if part in GROUPS]
    if "norm" in " ".join(parts[-2:]):
        known = ["norm"]
    return int(layer[1]) if layer else None, known[0] if known else "other"


def pool(drifts: Iterable[Drift]) -> dict[str, float]:
    """The metrics of several parameters taken as one: means by numel, ratios of sums, mean stable rank of matrices."""
    drifts = list(drifts)

    def total(field: str) -> float:
        return sum(getattr(drift, field) for drift in drifts)

    numel, square, source_square = total("numel"), total("square"), total("source_square")
    ranks = [drift.stable_rank for drift in drifts if drift.stable_rank is not None]
    # from ΔW and W0 rather than W and W0, for which 1 − cosine would drown in rounding
    product = source_square + total("product")
    norms = math.sqrt(source_square * max(product + total("product") + square, 0.0))
    pooled = {
        "mean_abs": total("absolute") / numel,
        "rel_fro": math.sqrt(_ratio(square, source_square)),
        "cosine": product / norms if norms else float(square == 0),
        "w1": sum(drift.w1 * drift.numel for drift in drifts) / numel,
    }
    return pooled | ({"stable_rank": sum(ranks) / len(ranks)} if ranks else {})


def by_group(drifts: Iterable[Drift]) -> dict[str, dict[str, float]]:
    """The pooled metrics of each group of parameters over all layers."""
    members: dict[str, list[Drift]] = {}
    for drift in drifts:
        members.setdefault(drift.group, []).append(drift)
    return {group: pool(members[group]) for group in members}


def rows(drifts: Iterable[Drift]) -> list[Row]:
    """The tidy table: a row per parameter and metric, then the same for whole groups, which have no name."""
    drifts = list(drifts)
    groups = by_group(drifts)
    numel = {group: sum(drift.numel for drift in drifts if drift.group == group) for group in groups}
    own = [Row(d.name, d.layer, d.group, metric, value, d.numel) for d in drifts for metric, value in d.metrics.items()]
    pooled = [Row(None, None, g, metric, value, numel[g]) for g in groups for metric, value in groups[g].items()]
    return own + pooled


@torch.no_grad()
def _drift(name: str, parameter: Tensor, source: Source) -> Drift:
    local, start, all_reduce = _shard(parameter)
    known = max(0, min(source.rows(name) - start, len(local)))
    now_RC = local[:known].flatten(1) if local.ndim > 1 else local[:known, None]
    delta_RC = torch.empty_like(now_RC, dtype=torch.float32)
    step = max(1, SLICE // now_RC.shape[1])
    slices = [slice(row, min(row + step, known)) for row in range(0, known, step)]

    sums = torch.zeros(5, dtype=torch.float64, device=local.device)
    bounds = torch.full((2,), -torch.inf, device=local.device)  # −min, max
    for part in slices:
        source_RC = source.read(name, start + part.start, start + part.stop).to(local.device, torch.float32)
        source_RC = source_RC.view_as(now_RC[part])
        torch.sub(now_RC[part], source_RC, out=delta_RC[part])
        delta, before = delta_RC[part].flatten(), source_RC.flatten()
        sums += torch.stack(
            [delta.norm(1), delta @ delta, before @ before, delta @ before, delta.new_tensor(len(delta))]
        )
        for least, most in (torch.aminmax(now_RC[part]), torch.aminmax(before)):
            bounds = torch.maximum(bounds, torch.stack([-least, most]))
    absolute, square, source_square, product, numel = all_reduce(sums, dist.ReduceOp.SUM).tolist()
    low, high = all_reduce(bounds, dist.ReduceOp.MAX).tolist()

    w1 = rank = square  # right where it is 0, and where training has diverged
    if square and math.isfinite(square):
        w1 = _w1(now_RC, delta_RC, slices, -low, high, all_reduce) / numel
        if parameter.ndim == 2:
            rank = 1 / _top(delta_RC.div_(math.sqrt(square)), all_reduce)
    layer, group = place(name)
    stable_rank = rank if parameter.ndim == 2 else None
    return Drift(name, layer, group, int(numel), absolute, square, source_square, product, w1, stable_rank)


def _shard(parameter: Tensor) -> tuple[Tensor, int, AllReduce]:
    """What this process holds of a parameter, its first row in the whole, and the sum over the other holders."""
    if not isinstance(parameter, DTensor):
        return parameter, 0, lambda tensor, _: tensor  # also under DDP, where every rank holds everything
    mesh, placements = parameter.device_mesh, parameter.placements
    _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)

    def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(tensor, op, group=mesh.get_group(dim))
        return tensor

    return parameter.to_local(), offset[0], all_reduce


def _w1(now_RC: Tensor, delta_RC: Tensor, slices: list[slice], low: float, high: float, all_reduce: AllReduce) -> float:
    """∫|F − F0| of the counts below each value, with the integrand taken at the edges of equal bins."""
    if high <= low:
        return 0.0
    scale = BINS / (high - low)
    count = torch.zeros(BINS, dtype=torch.int64, device=now_RC.device)
    for part in slices:
        now_N = now_RC[part].float().flatten()
        # W − ΔW gives W0 back up to its last bit, and saves a second reading
        after, before = (
            (values_N - low).mul_(scale).int().clamp_(0, BINS - 1).bincount(minlength=BINS)
            for values_N in (now_N, now_N - delta_RC[part].flatten())
        )
        count += after - before
    return all_reduce(count, dist.ReduceOp.SUM).cumsum(0).abs().sum().item() / scale


def _top(delta_RC: Tensor, all_reduce: AllReduce) -> float:
    """The largest eigenvalue of ΔWᵀΔW by power iteration, over the span of all its vectors (Lanczos).

    The span converges several times faster than the last vector alone when ΔW is nearly noise. ΔW has norm 1.
    """
    before_C = torch.zeros(delta_RC.shape[1], device=delta_RC.device)
    next_C = torch.randn(delta_RC.shape[1], generator=torch.Generator().manual_seed(0)).to(delta_RC.device)
    diagonal, below = [], [torch.linalg.vector_norm(next_C)]
    vector_C = next_C / below[0]
    for _ in range(POWERS):
        next_C = all_reduce(delta_RC.T @ (delta_RC @ vector_C), dist.ReduceOp.SUM)
        diagonal.append(next_C @ vector_C)
        next_C = next_C - diagonal[-1] * vector_C
        if len(diagonal) > 1:
            next_C -= below[-1] * before_C
        below.append(torch.linalg.vector_norm(next_C))
        # once the rank of ΔW is exhausted the rest is rounding: a new start, coupled to the old one by next to nothing
        before_C, vector_C = vector_C, next_C / below[-1].clamp(min=1e-30)
    tridiagonal = torch.diag(torch.stack(diagonal)) + torch.diag(torch.stack(below[1:-1]), -1)
    return torch.linalg.eigvalsh(tridiagonal)[-1].item()  # reads the lower triangle only


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf if a else 0.0
