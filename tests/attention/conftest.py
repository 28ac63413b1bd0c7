"""What tests of backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dlm_lightning.attention import Plan


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """`assert_same(plans, inputs, *options)`: two plans attend alike, and so do gradients through them."""

    def check(plans: Sequence[Plan], inputs: Sequence[Tensor], *options: object) -> None:
        inputs = [x.detach().requires_grad_() for x in inputs]
        mine, expected = (plan.attend(*inputs, *options) for plan in plans)
        assert torch.allclose(mine, expected, atol=1e-5)
        weight = torch.randn_like(expected)
        for a, b in zip(*(torch.autograd.grad(out, inputs, weight) for out in (mine, expected)), strict=True):
            assert torch.allclose(a, b, atol=1e-4)

    return check
