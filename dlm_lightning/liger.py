"""Liger's fused head, on a GPU: −log p and the gradients of its weighted sum, some tokens at a time.

Shapes: N tokens read, D hidden size, V vocabulary, X of its rows that are banned.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers.utils.versions import require_version

from dlm_lightning import flops

PACKAGE = "liger-kernel>=0.8.5,<0.9"  # weights tokens before it sums over them; the function is no public name


@cache
def there(device: torch.device) -> bool:
    """Whether Liger is installed and works on this device."""
    try:
        require_version(PACKAGE)
    except ImportError:
        return False
    return device.type == "cuda"


def gradients(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    banned_X: Tensor,
    trained: bool,
    at_a_time: int,
) -> tuple[Tensor, ...]:
    """Each −log p [N], and the gradients of Σ w·(−log p): of hidden states [N, D] and, if trained, of the head [V, D].

    For logits that are hidden states times the head and nothing else. Products are of the dtype of both, the sum over
    tokens is made in float32; Liger rounds each token's weight, and at the end the head's gradient, to that dtype. It
    asks the device once how many targets there are. At most `at_a_time` tokens have logits and their gradient at a
    time, or as many as Liger takes at least.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    lowest = torch.finfo(head_VD.dtype).min / 2  # not −∞, which Liger turns into nan where many rows begin with it
    allowed_V = head_VD.new_zeros(len(head_VD)).index_fill_(0, banned_X, lowest)
    budget = at_a_time * len(head_VD) // (2 * hidden_ND.numel())  # of logits, over hidden states; Liger rounds up
    with flops.gradient(2 / 3 if trained else 1 / 2):
        # the autograd function around it would compute all logits a second time to learn of the weights
        nll_N, _, _, _, grad_ND, grad_VD, _ = fused_linear_cross_entropy_forward(
            hidden_ND,
            head_VD,
            target_N,
            bias=allowed_V,
            reduction="none",
            accum_dtype=torch.float32,
            token_grad_output=weight_N,
            compute_gradients=True,
            weight_requires_grad=trained,
            chunk_mem_const=max(1, budget),
        )
    return (nll_N, grad_ND, grad_VD) if trained else (nll_N, grad_ND)
