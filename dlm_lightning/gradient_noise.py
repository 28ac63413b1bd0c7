"""The variance of a recipe's gradient: how much of it is masks, how much is data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlm_lightning.likelihood import redrawn
from dlm_lightning.module import Recipe
from dlm_lightning.view import Batch

STREAM = 5  # of the noise


class GradientNoise(NamedTuple):
    """Traces of covariances of the gradient of the mean loss per token, and ‖E g‖², all unbiased.

    noise: over draws of the masks for the same rows. data: over rows, without what the masks add. square: ‖E g‖².
    """

    noise: float
    data: float
    square: float


def gradient_noise(recipe: Recipe, batches: Sequence[Batch], draws: int = 4, seed: int = 0) -> GradientNoise:
    """By `draws` of the noise for each of several batches of rows; the gradients are left empty.

    ValueError for less than two batches or draws. For a network whose parameters are whole on this device.
    """
    if len(batches) < 2 or draws < 2:
        raise ValueError(f"a variance needs two batches and two draws at least, not {len(batches)} and {draws}")
    parameters = [parameter for parameter in recipe.denoiser.parameters() if parameter.requires_grad]
    means, within = [], 0.0
    for batch in batches:
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        squares = 0.0
        for draw in range(draws):
            gradients = _gradients(recipe, redrawn(batch, seed, STREAM, draw)[0], parameters)
            squares += _square(gradients)
            torch._foreach_add_(total, gradients)
        torch._foreach_div_(total, draws)
        within += (squares - draws * _square(total)) / (draws - 1) / len(batches)
        means.append(total)
    mean = [torch.stack(tensors).mean(0) for tensors in zip(*means, strict=True)]
    count = len(batches)
    between = (sum(map(_square, means)) - count * _square(mean)) / (count - 1)
    return GradientNoise(within, between - within / draws, _square(mean) - between / count)


def _gradients(recipe: Recipe, batch: Batch, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    _, view, scored = recipe.shown(batch, recipe.pattern)
    loss = recipe.denoiser(view, *scored)[0] / batch.maskable_BL.sum().clamp(min=1)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.float() for p, g in zip(parameters, found, strict=True)]


def _square(tensors: list[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)
