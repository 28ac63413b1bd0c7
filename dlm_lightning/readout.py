"""The head: hidden states to logits, −log p, and the weighted sum of −log p whose gradient is made in its forward pass.

Shapes: N tokens read, n of them at a time, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dlm_lightning import bfloat16

AT_A_TIME = {"cpu": 2**21, "cuda": 2**28}  # logits that exist at the same time: a CPU's are to stay in its cache


def logits(network: PreTrainedModel, hidden_ND: Tensor, banned_X: Tensor) -> Tensor:
    """The network's own readout [N, V] in float32 at least, −∞ for the rows of the vocabulary that are banned."""
    return _raw(network, hidden_ND).index_fill(1, banned_X, -torch.inf)


def nll(network: PreTrainedModel, hidden_ND: Tensor, target_N: Tensor, banned_X: Tensor) -> Tensor:
    """−log p of the targets [N], some at a time; their logits are computed once more in the backward pass."""

    def some(hidden_nD: Tensor, target_n: Tensor) -> Tensor:
        return F.cross_entropy(logits(network, hidden_nD, banned_X), target_n, reduction="none")

    parts = [checkpoint(some, *part, use_reentrant=False) for part in _parts(network, hidden_ND, target_N)]
    return torch.cat(parts)


def weighted_nll(
    network: PreTrainedModel, hidden_ND: Tensor, target_N: Tensor, weight_N: Tensor, banned_X: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ w·(−log p) and, without a gradient, each −log p [N].

    The gradient of the logits, w·(p − 1[target]), is known as soon as they are, so hidden states and head get theirs
    in the forward pass, some tokens at a time, and no logits are computed twice. A sum that is not differentiated, or
    differentiated twice, needs `nll`.
    """
    if not torch.is_grad_enabled():
        nll_N = nll(network, hidden_ND, target_N, banned_X)
        return (nll_N * weight_N).sum(), nll_N
    head: Any = network.get_output_embeddings()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _WeightedNll.apply(network, hidden_ND, target_N, weight_N, banned_X, *trained)  # type: ignore[return-value]


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        network: PreTrainedModel,
        hidden_ND: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        banned_X: Tensor,
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        grad_ND = torch.empty_like(hidden_ND)
        grads = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        nll_N = weight_N.new_empty(len(target_N))
        first = 0
        for hidden_nD, target_n, weight_n in _parts(network, hidden_ND, target_N, weight_N):
            last = first + len(target_n)
            hidden_nD = hidden_nD.detach().requires_grad_()
            with torch.enable_grad():
                raw_nV = _raw(network, hidden_nD)
            log_p_nV = raw_nV.detach().index_fill_(1, banned_X, -torch.inf).log_softmax(1)
            nll_N[first:last] = -log_p_nV.gather(1, target_n[:, None])[:, 0]
            slope_nV = log_p_nV.exp_().mul_(weight_n[:, None])
            slope_nV.scatter_add_(1, target_n[:, None], -weight_n[:, None].to(slope_nV.dtype))
            grad_nD, *more = torch.autograd.grad(raw_nV, [hidden_nD, *trained], slope_nV)
            grad_ND[first:last] = grad_nD
            for total, part in zip(grads, more, strict=True):
                total += part
            first = last
        ctx.grads = [grad_ND, *(total.to(p.dtype) for total, p in zip(grads, trained, strict=True))]
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradient of a weighted sum of -log p is there for one backward pass")
        grad_ND, *grads = (grad.mul_(slopes[0]) for grad in ctx.grads)
        ctx.grads = None
        return None, grad_ND, None, None, None, *grads


def _raw(network: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """The head's logits, with what some families do to them after it (a probe compares)."""
    config, head = network.config, network.get_output_embeddings()
    if bfloat16.in_hardware(hidden_ND.device) or any(p.dtype == torch.bfloat16 for p in head.parameters()):
        logits_NV = head(hidden_ND).float()
    else:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits_NV = head(hidden_ND.float())
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    if scale != 1:
        logits_NV = logits_NV * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV


def _parts(network: PreTrainedModel, *tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Tensors over N cut alike, so that no more logits exist at a time than may."""
    size = max(1, AT_A_TIME[tensors[0].device.type] // network.config.vocab_size)
    return [*zip(*(tensor.split(size) for tensor in tensors), strict=True)]
