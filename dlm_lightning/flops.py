"""FLOPs: counted on the operations that run, real or fake, with what a training step needs of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # torch's own counter knows the kernels of GPUs only


class FlopCounter(FlopCounterMode):
    """Counts the FLOPs of matrix products and attention while it is entered; attention counts all pairs of tokens."""

    def __init__(self) -> None:
        kernels = {getattr(torch.ops.aten, _CPU): _attention, getattr(torch.ops.aten, f"{_CPU}_backward"): _backward}
        super().__init__(display=False, custom_mapping=kernels)


def _attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products, [S, D] × [D, K] and [S, K] × [K, D], for each query head."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


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
