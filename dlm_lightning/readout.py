"""What is read from a network: logits, −log p, and its weighted sum, whose gradient is made in the forward pass.

Shapes: N tokens read, n of them at a time, D hidden size, V vocabulary, X of its rows that are banned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dlm_lightning import bfloat16, flops

AT_A_TIME = {"cpu": 2**23, "cuda": 2**28}  # logits that exist at the same time, on other devices as on a GPU
AFTER_THE_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # keys of configs
MOSTLY = 0.75  # the share of all tokens from which on it is not worth to read some alone


def logits(network: PreTrainedModel, hidden_ND: Tensor, banned_X: Tensor) -> Tensor:
    """The network's own readout [N, V] in float32, −∞ for the rows of the vocabulary that are banned."""
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
        weight_VD = _sole_weight(network, hidden_ND.device)
        first = 0
        for hidden_nD, target_n, weight_n in _parts(network, hidden_ND, target_N, weight_N):
            last = first + len(target_n)
            hidden_nD = hidden_nD.detach().requires_grad_(weight_VD is None)
            with torch.set_grad_enabled(weight_VD is None):
                raw_nV = _raw(network, hidden_nD)
            nll_n, slope_nV, scale_n1 = _slope(raw_nV.detach().index_fill_(1, banned_X, -torch.inf), target_n)
            scale_n1 = scale_n1 * weight_n[:, None]
            if weight_VD is not None:
                with flops.gradient(), torch.autocast(hidden_ND.device.type, enabled=False):
                    grad_nD = slope_nV @ weight_VD * scale_n1
                    for total in grads:
                        total.addmm_(slope_nV.t(), hidden_nD.float() * scale_n1)
            else:
                grad_nD, *more = torch.autograd.grad(raw_nV, [hidden_nD, *trained], slope_nV.mul_(scale_n1))
                for total, part in zip(grads, more, strict=True):
                    total += part
            nll_N[first:last], grad_ND[first:last] = nll_n, grad_nD
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


def _slope(logits_nV: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """−log p of the targets, and its slope p − 1[target] as a product: in the logits' place, and a scale [n, 1]."""
    target_n1 = target_n[:, None]
    logit_n1, top_n1 = logits_nV.gather(1, target_n1), logits_nV.amax(1, keepdim=True)
    total_n1 = logits_nV.sub_(top_n1).exp_().sum(1, keepdim=True)
    nll_n = (top_n1 - logit_n1 + total_n1.log())[:, 0]
    return nll_n, logits_nV.scatter_add_(1, target_n1, -total_n1), 1 / total_n1


@contextmanager
def read_alone(layer: nn.Module, read_N: Tensor, tokens: int) -> Iterator[None]:
    """Meanwhile the last layer has its feed-forward part for the tokens at flat indices `read_N` alone, of so many.

    The others leave it without, and must not be read. Not for a layer that is compiled or computes its activations
    anew, and not where that would save little.
    """
    inner = getattr(layer, "mlp", None)
    repeated = layer.training and getattr(layer, "gradient_checkpointing", False)
    if inner is None or repeated or layer._compiled_call_impl is not None or not 0 < len(read_N) <= tokens * MOSTLY:
        yield
        return
    times_N = torch.zeros(tokens, device=read_N.device).index_add(0, read_N, torch.ones_like(read_N, dtype=torch.float))
    share_N1 = 1 / times_N[read_N][:, None]  # of a token that is read several times
    shape: list[torch.Size] = []

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape.append(args[0].shape)
        return args[0].flatten(0, 1)[read_N][None], *args[1:]

    def put_back(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        rows_ND = out[0] * share_N1.to(out.dtype)
        return rows_ND.new_zeros(tokens, out.shape[2]).index_add(0, read_N, rows_ND).view(shape[0])

    hooks = [inner.register_forward_pre_hook(take), inner.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def _sole_weight(network: PreTrainedModel, device: torch.device) -> Tensor | None:
    """The head's weight, if logits are hidden states times it and nothing else, in float32.

    Then two products are all that their gradient needs, and the weight's can be added up in its place.
    """
    config, head = network.config, network.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.dtype != torch.float32:
        return None
    if torch.is_autocast_enabled(device.type) and bfloat16.in_hardware(device):
        return None
    alone = all(getattr(config, key, None) in (None, 1) for key in AFTER_THE_HEAD)
    return head.weight.detach() if alone else None


def _parts(network: PreTrainedModel, *tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Tensors over N cut alike, so that no more logits exist at a time than may."""
    size = max(1, AT_A_TIME.get(tensors[0].device.type, AT_A_TIME["cuda"]) // network.config.vocab_size)
    return [*zip(*(tensor.split(size) for tensor in tensors), strict=True)]
