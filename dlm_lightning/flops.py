"""FLOPs: counted on the operations that run, real or fake, with what a training step needs of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # torch's own counter knows the kernels of GPUs only


class FlopCounter(FlopCounterMode):
    """Counts the FLOPs of matrix products and attention while it is entered, those of pairs that are skipped left out.

    forward: those of forward passes alone; what a forward pass differentiates by itself, as the head does, is not.
    """

    forward = 0
    by_hand: ClassVar[float] = 0.0  # see `gradient`

    def __init__(self) -> None:
        kernels = {getattr(torch.ops.aten, _CPU): _attention, getattr(torch.ops.aten, f"{_CPU}_backward"): _backward}
        kernels[torch.ops.aten.addmm_] = _added
        super().__init__(display=False, custom_mapping=kernels)
        self.mod_tracker: Any = _Everything()

    def _count_flops(self, op: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.get_total_flops()
        out = super()._count_flops(op, out, args, kwargs)
        if torch._C._current_graph_task_id() == -1:  # autograd is not at work
            self.forward += round((1 - self.by_hand) * (self.get_total_flops() - before))
        return out


@contextmanager
def gradient(share: float = 1.0) -> Iterator[None]:
    """Meanwhile, that share of FLOPs is of a gradient that is computed without autograd, and not of a forward pass."""
    FlopCounter.by_hand = share
    try:
        yield
    finally:
        FlopCounter.by_hand = 0.0


class _Everything:
    """In place of torch's tracker, which tells modules apart by hooks that hold on to what passes through them."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def _attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products, [S, D] × [D, K] and [S, K] × [K, D], for each query head."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def _added(_total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """One product, added to what is there."""
    return 2 * a[0] * a[1] * b[1]


def _backward(grad: Any, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """The scores once more, and four products for the gradients."""
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]


def needed(forward: float, network: nn.Module) -> float:
    """FLOPs of a training step whose forward pass takes `forward`: recomputation does not count, frozen weights do.

    As much again for the gradients of the activations, and for those of the weights by the share that is trained.
    """
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return forward * (2 + trained / sum(p.numel() for p in parameters))
