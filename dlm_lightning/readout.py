"""What is read from a network: logits, −log p, and its weighted sum, whose gradient is made in the forward pass.

Shapes: N tokens read of T, n of them at a time, D hidden size, V vocabulary, X of its rows that are banned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dlm_lightning import bfloat16, flops, liger

Head = Literal["torch", "liger"]
AT_A_TIME = {"cpu": 2**23, "cuda": 2**28}  # logits that exist at the same time, on other devices as on a GPU
AFTER_THE_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # keys of configs
MOSTLY = 0.75  # the share of all tokens from which on it is not worth to read some alone


def logits(network: PreTrainedModel, hidden_ND: Tensor, banned_X: Tensor) -> Tensor:
    """The network's own readout [N, V] in float32, −∞ for the rows of the vocabulary that are banned."""
    return _raw(network, hidden_ND).index_fill(1, banned_X, -torch.inf)


def require(head: Head, network: PreTrainedModel, device: torch.device) -> None:
    """Raises ValueError where the head cannot be computed so."""
    if head != "liger":
        return
    if not liger.there(device):
        raise ValueError(f"model.head: liger needs CUDA and {liger.PACKAGE}, the extra liger")
    if not _is_matrix(network):
        raise ValueError(f"model.head: liger does not compute the head of {network.config.model_type}, but torch does")


def nll(network: PreTrainedModel, hidden_ND: Tensor, target_N: Tensor, banned_X: Tensor) -> Tensor:
    """−log p of the targets [N], some at a time; their logits are computed once more in the backward pass."""

    def some(hidden_nD: Tensor, target_n: Tensor) -> Tensor:
        return F.cross_entropy(logits(network, hidden_nD, banned_X), target_n, reduction="none")

    parts = [checkpoint(some, *part, use_reentrant=False) for part in _parts(network, hidden_ND, target_N)]
    return torch.cat(parts)


@torch.compiler.disable  # its gradient is made where a compiler looks for a forward pass alone
def weighted_nll(
    network: PreTrainedModel,
    hidden_ND: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    banned_X: Tensor,
    head: Head = "torch",
) -> tuple[Tensor, Tensor]:
    """Σ w·(−log p) and, without a gradient, each −log p [N]; by Liger where `require` has nothing against it.

    The gradient of the logits, w·(p − 1[target]), is known as soon as they are, so hidden states and head get theirs
    in the forward pass, some tokens at a time, and no logits are computed twice. A sum that is not differentiated, or
    differentiated twice, needs `nll`. RuntimeError for a second backward pass.
    """
    if not torch.is_grad_enabled():
        nll_N = nll(network, hidden_ND, target_N, banned_X)
        return (nll_N * weight_N).sum(), nll_N
    trained = [p for p in network.get_output_embeddings().parameters() if p.requires_grad]
    return _WeightedNll.apply(network, hidden_ND, target_N, weight_N, banned_X, head, *trained)  # type: ignore[return-value]


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        network: PreTrainedModel,
        hidden_ND: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        banned_X: Tensor,
        head: Head,
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        device, tokens = hidden_ND.device, (target_N, weight_N, banned_X)
        if _is_matrix(network):
            head_VD = network.get_output_embeddings().weight
            dtype = torch.get_autocast_dtype(device.type) if _in_half(device) else head_VD.dtype
            both = hidden_ND.detach().to(dtype), head_VD.detach().to(dtype)
            fused = head == "liger" and len(target_N) > 0 and liger.there(device)
            gradients = liger.gradients if fused else _by_products
            with torch.autocast(device.type, enabled=False):
                nll_N, *grads = gradients(*both, *tokens, bool(trained), _at_a_time(network, device))
        else:
            nll_N, *grads = _by_autograd(network, hidden_ND, *tokens, trained)
        ctx.grads = [x.to(y.dtype) for x, y in zip(grads, [hidden_ND, *trained], strict=True)]
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradient of a weighted sum of -log p is there for one backward pass")
        grad_ND, *grads = (grad.mul_(slopes[0]) for grad in ctx.grads)
        ctx.grads = None
        return None, grad_ND, None, None, None, None, *grads


def _by_products(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    banned_X: Tensor,
    trained: bool,
    at_a_time: int,
) -> tuple[Tensor, ...]:
    """Each −log p [N], and the gradients of Σ w·(−log p): of hidden states [N, D] and, if trained, of the head [V, D].

    For logits that are hidden states times the head and nothing else. Products are of the dtype of both, what is
    between them and the sum over tokens of float32; all chunks have their logits in the same memory.
    """
    N, V = len(hidden_ND), len(head_VD)
    exact = hidden_ND.dtype == torch.float32
    product_nV = hidden_ND.new_empty(min(N, at_a_time), V)
    logits_nV = product_nV if exact else torch.empty_like(product_nV, dtype=torch.float32)
    nll_N, grad_ND = weight_N.new_empty(N), torch.empty_like(hidden_ND, dtype=torch.float32)
    grads = [torch.zeros_like(head_VD, dtype=torch.float32)] if trained else []
    for first in range(0, N, at_a_time):
        part = slice(first, first + at_a_time)
        hidden_nD, weight_n1 = hidden_ND[part], weight_N[part, None]
        some_nV = torch.mm(hidden_nD, head_VD.t(), out=product_nV[: len(hidden_nD)])
        slope_nV = some_nV if exact else logits_nV[: len(hidden_nD)].copy_(some_nV)
        nll_N[part] = _slope(slope_nV.index_fill_(1, banned_X, -torch.inf), target_N[part])
        if not exact:
            some_nV.copy_(slope_nV)
        with flops.gradient():
            grad_ND[part] = some_nV @ head_VD * weight_n1
            for total_VD in grads:
                weighted_nD = (hidden_nD * weight_n1).to(some_nV.dtype)
                if exact:
                    total_VD.addmm_(some_nV.t(), weighted_nD)
                else:
                    total_VD += some_nV.t() @ weighted_nD
    return nll_N, grad_ND, *grads


def _by_autograd(
    network: PreTrainedModel,
    hidden_ND: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    banned_X: Tensor,
    trained: Sequence[nn.Parameter],
) -> tuple[Tensor, ...]:
    """The same, by hidden states and whatever is trained of any head."""
    nll_N, grad_ND = weight_N.new_empty(len(target_N)), torch.empty_like(hidden_ND)
    grads = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
    first = 0
    for hidden_nD, target_n, weight_n in _parts(network, hidden_ND, target_N, weight_N):
        part = slice(first, first := first + len(target_n))
        hidden_nD = hidden_nD.detach().requires_grad_()
        with torch.enable_grad():
            raw_nV = _raw(network, hidden_nD)
        slope_nV = raw_nV.detach().index_fill_(1, banned_X, -torch.inf)
        nll_N[part] = _slope(slope_nV, target_n)
        grad_ND[part], *more = torch.autograd.grad(raw_nV, [hidden_nD, *trained], slope_nV.mul_(weight_n[:, None]))
        for total, one in zip(grads, more, strict=True):
            total += one
    return nll_N, grad_ND, *grads


def _slope(logits_nV: Tensor, target_n: Tensor) -> Tensor:
    """−log p of the targets [n]; leaves its slope, p − 1[target], in the logits' place.

    To the accuracy of torch's softmax, which on CPUs adds a row up in float32 number by number.
    """
    target_n1 = target_n[:, None]
    logit_n1, top_n1 = logits_nV.gather(1, target_n1), logits_nV.amax(1, keepdim=True)
    if logits_nV.device.type in AT_A_TIME:
        torch.softmax(logits_nV, 1, out=logits_nV)  # these devices' kernels read a row before they write it
    else:
        logits_nV.copy_(logits_nV.softmax(1))
    nll_n1 = top_n1 - logit_n1 - logits_nV.amax(1, keepdim=True).log()
    logits_nV.scatter_(1, target_n1, torch.expm1(-nll_n1))
    return nll_n1[:, 0]


@contextmanager
def read_alone(layer: nn.Module, read_N: Tensor, tokens: int) -> Iterator[None]:
    """Meanwhile the last layer has its feed-forward part for the tokens at flat indices `read_N` alone, of so many.

    The others leave it without, and must not be read. Not for a layer that is compiled as a whole or computes its
    activations anew, and not where that would save little.
    """
    inner = getattr(layer, "mlp", None)
    repeated = layer.training and getattr(layer, "gradient_checkpointing", False)
    if inner is None or repeated or layer._compiled_call_impl is not None or not 0 < len(read_N) <= tokens * MOSTLY:
        yield
        return
    layer.mlp = _Alone(inner, read_N, tokens)
    try:
        yield
    finally:
        layer.mlp = inner


class _Alone(nn.Module):
    """A feed-forward part of some tokens, with nothing for the others."""

    def __init__(self, inner: nn.Module, read_N: Tensor, tokens: int) -> None:
        super().__init__()
        self.inner, self.read_N = inner, read_N
        ones_N = torch.ones_like(read_N, dtype=torch.float)
        times_N = ones_N.new_zeros(tokens).index_add(0, read_N, ones_N)
        self.share_N1 = 1 / times_N[read_N][:, None]  # of a token that is read several times

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        flat_TD = hidden_BSD.flatten(0, 1)
        rows_ND = self.inner(flat_TD[self.read_N][None])[0]
        rows_ND = rows_ND * self.share_N1.to(rows_ND.dtype)
        return rows_ND.new_zeros(flat_TD.shape).index_add(0, self.read_N, rows_ND).view_as(hidden_BSD)


def _raw(network: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """The head's logits, with what some families do to them after it (a probe compares)."""
    config, head = network.config, network.get_output_embeddings()
    if _in_half(hidden_ND.device) or next(head.parameters()).dtype != torch.float32:
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


def _is_matrix(network: PreTrainedModel) -> bool:
    """Whether logits are hidden states times a matrix, and nothing else."""
    config, head = network.config, network.get_output_embeddings()
    alone = all(getattr(config, key, None) in (None, 1) for key in AFTER_THE_HEAD)
    hooks = (head._forward_hooks, head._forward_pre_hooks)  # which are called with the head only
    return alone and type(head) is nn.Linear and head.bias is None and not any(hooks)


def _in_half(device: torch.device) -> bool:
    """Whether autocast makes products of half precision: not where that would be imitated."""
    return torch.is_autocast_enabled(device.type) and bfloat16.in_hardware(device)


def _parts(network: PreTrainedModel, *tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Tensors over N cut alike, so that no more logits exist at a time than may."""
    size = _at_a_time(network, tensors[0].device)
    return [*zip(*(tensor.split(size) for tensor in tensors), strict=True)]


def _at_a_time(network: PreTrainedModel, device: torch.device) -> int:
    """Tokens whose logits may exist at the same time."""
    return max(1, AT_A_TIME.get(device.type, AT_A_TIME["cuda"]) // network.config.vocab_size)
