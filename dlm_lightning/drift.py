"""Weight drift: how far a network has moved from its AR source, read from the source's files and never loaded whole.

Shapes: R rows of a parameter that this process holds and the source has, C columns (all other dimensions), N numbers
of a slice of rows or of a vector, D directions of a move (down, up), B bins. Parameters sharded by FSDP2 are measured
shard by shard; the sums are added over the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dlm_lightning import lora, shards

METRICS = ("mean_abs", "rel_fro", "cosine", "w1", "stable_rank")
GROUPS = {
    **{f"{name}_proj": name for name in ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")},
    "embed_tokens": "embedding",
    "lm_head": "head",
}
BINS = 1 << 14  # of the histograms behind the w1 of matrices
POWERS = 20  # products with ΔWᵀΔW per spectral norm
SLICE = 1 << 20  # numbers of the source in memory at a time

AllReduce = Callable[[Tensor, dist.ReduceOp.RedOpType], Tensor]


class Weights(Protocol):
    """Named tensors, of which rows are read as they are needed: those of a `Source`, or of a checkpoint."""

    @property
    def names(self) -> Iterable[str]:
        """All names."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor."""

    def rows(self, name: str) -> int:
        """The length of a tensor's first dimension."""


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

    numel: how many numbers were compared.
    absolute: Σ|ΔW|.
    square: ΣΔW².
    source_square: ΣW0².
    product: ΣΔW·W0.
    w1: numel times the Wasserstein-1 distance between the distributions of the values of W and W0, at most `absolute`.
    stable_rank: ‖ΔW‖_F²/‖ΔW‖_2², 0 without drift; None for a parameter that is no matrix.
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


def measure(network: nn.Module, source: Weights) -> list[Drift]:
    """The drift of each parameter that the source has under the same name; all ranks call it together under FSDP2.

    Rows that the source lacks (an added mask token) are left out; tied weights are one parameter, the embedding. What
    an adapter adds to a weight is part of that weight.
    """
    known = ((name, parameter) for name, parameter in lora.named_parameters(network) if name in source)
    return [_drift(name, parameter, lora.update(network, name), source) for name, parameter in known]


def between(before: Weights, after: Weights) -> list[Drift]:
    """The drift of each tensor that both have under the same name; ValueError if their rows have different shapes."""
    drifts = []
    for name in (name for name in after.names if name in before):
        now, one = after.read(name), before.read(name, 0, 1)
        if now.shape[1:] != one.shape[1:]:
            raise ValueError(
                f"{name} has rows of {list(one.shape[1:])} in one and of {list(now.shape[1:])} in the other, "
                "so they are not checkpoints of one model"
            )
        drifts.append(_drift(name, now, None, before))
    return drifts


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
        "w1": total("w1") / numel,
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
def _drift(name: str, parameter: Tensor, update: lora.Update | None, source: Weights) -> Drift:
    local, start = shards.local(parameter)
    all_reduce = _sum_over_holders(parameter)
    if update is not None:
        local = update.rows(start, start + len(local)).add_(local)
    known = max(0, min(source.rows(name) - start, len(local)))
    now_RC = local[:known].flatten(1) if local.ndim > 1 else local[:known, None]
    delta_RC = torch.empty_like(now_RC, dtype=torch.float32)
    step = max(1, SLICE // now_RC.shape[1])
    slices = [slice(row, min(row + step, known)) for row in range(0, known, step)]

    sums = torch.zeros(6, dtype=torch.float64, device=local.device)
    for part in slices:
        source_RC = source.read(name, start + part.start, start + part.stop).to(local.device, torch.float32)
        source_RC = source_RC.view_as(now_RC[part])
        torch.sub(now_RC[part], source_RC, out=delta_RC[part])
        delta, before = delta_RC[part].flatten(), source_RC.flatten()
        products = [delta @ delta, before @ before, delta @ before]
        sums += torch.stack([delta.norm(1), before.norm(1), *products, delta.new_tensor(len(delta))])
    absolute, source_absolute, square, source_square, product, numel = all_reduce(sums, dist.ReduceOp.SUM).tolist()

    w1 = rank = square  # right where it is 0, and where training has diverged
    if square and math.isfinite(square):
        if parameter.ndim == 1:
            w1 = min(absolute, _sorted_w1(parameter, source.read(name)))
        else:
            mean = (absolute + source_absolute) / numel
            w1 = absolute * _uncancelled(now_RC, delta_RC, slices, mean, all_reduce)
        if parameter.ndim == 2:
            rank = 1 / _top(delta_RC.div_(math.sqrt(square)), all_reduce)
    layer, group = place(name)
    stable_rank = rank if parameter.ndim == 2 else None
    return Drift(name, layer, group, int(numel), absolute, square, source_square, product, w1, stable_rank)


def _sum_over_holders(parameter: Tensor) -> AllReduce:
    """A reduction over the processes that hold the other shards of a parameter."""
    if not isinstance(parameter, DTensor):
        return lambda tensor, _: tensor  # also under DDP, where every rank holds everything
    mesh, placements = parameter.device_mesh, parameter.placements

    def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(tensor, op, group=mesh.get_group(dim))
        return tensor

    return all_reduce


def _sorted_w1(vector: Tensor, source_N: Tensor) -> float:
    """Σ|W − W0| over the sorted values; all ranks call it together."""
    now_N = shards.whole(vector)
    known = min(len(now_N), len(source_N))
    now_N, before_N = (values_N[:known].double().sort().values for values_N in (now_N, source_N.to(now_N.device)))
    return (now_N - before_N).abs().sum().item()


def _uncancelled(now_RC: Tensor, delta_RC: Tensor, slices: list[slice], mean: float, all_reduce: AllReduce) -> float:
    """W1 / mean |ΔW|, that is ∫|down − up| / ∫(down + up) where down(x) and up(x) are how many values moved across x.

    The integrands are taken at the edges of bins that are equal in x/(s + |x|): fine where values are dense, yet no
    outlier lies beyond them. Both integrals miss the same moves, so moves far smaller than a bin are measured, too.
    """
    # by steps, so that a sum that is rounded otherwise moves no edge; π keeps the edges off the values of bfloat16
    scale = math.ldexp(math.pi / 2, math.frexp(mean)[1])  # s

    def bins(values_N: Tensor) -> Tensor:
        softsign_N = values_N.abs().add_(scale).reciprocal_().mul_(values_N)
        return softsign_N.add_(1).mul_(BINS / 2).int().clamp_(max=BINS - 1)

    count_DB = torch.zeros(2, BINS, dtype=torch.int64, device=now_RC.device)
    for part in slices:
        now_N = now_RC[part].float().flatten()
        # W − ΔW gives W0 back up to its last bit, and saves a second reading
        after_N, before_N = bins(now_N), bins(now_N - delta_RC[part].flatten())
        up_N = after_N > before_N
        for bins_N, sign in ((after_N, 1), (before_N, -1)):
            count_DB += sign * bins_N.add_(up_N, alpha=BINS).bincount(minlength=2 * BINS).view(2, BINS)
    moved_DB = all_reduce(count_DB, dist.ReduceOp.SUM).cumsum(1)[:, :-1]
    centre_B = torch.linspace(1 / BINS - 1, 1 - 1 / BINS, BINS, dtype=torch.float64, device=now_RC.device)
    width_B = (centre_B / (1 - centre_B.abs())).diff()  # around an edge, in units of s
    net, gross = ((count_B * width_B).sum().item() for count_B in (moved_DB.sum(0).abs(), moved_DB.abs().sum(0)))
    return net / gross if gross else 1.0


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
