"""The arms: ways to compute the loss of a training step, all on one network, one optimizer and one batch.

Shapes: B rows, L tokens per copy, D documents of a row, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlm_lightning import attention, readout
from dlm_lightning.bench.baselines import BASELINES, Loss
from dlm_lightning.catalog import nearest
from dlm_lightning.compilation import compile_layers
from dlm_lightning.loss import Scored, score
from dlm_lightning.module import Recipe
from dlm_lightning.plan import Prepared, rows
from dlm_lightning.view import AUTOREGRESSIVE, Batch, View

OURS, AR = "ours", "ar"
SAME = 0.01  # by which the losses of equal arms may differ, relatively, under bfloat16


class Arm(NamedTuple):
    """A loss by its name, and what computing it takes at least: the view and its scored tokens, from the batch.

    The loss takes the batch on the host, as training does, or else on the device.
    """

    name: str
    loss: Loss
    shown: Callable[[Recipe, Batch], tuple[View, Scored]]
    from_host: bool = False


def arms(baselines: Sequence[str]) -> list[Arm]:
    """Our step, the baselines that are named, and an AR step of the same network on the same data tokens."""
    for name in baselines:
        if name not in BASELINES:
            raise ValueError(f"there is no baseline {name}, only {' and '.join(BASELINES)}{nearest(name, BASELINES)}")
    others = [Arm(name, BASELINES[name](), shown) for name in dict.fromkeys(baselines)]
    return [Arm(OURS, ours, shown, True), *others, Arm(AR, autoregressive, shown_causally, True)]


def shown(recipe: Recipe, batch: Batch) -> tuple[View, Scored]:
    """What the recipe shows of a batch, by the pattern of the finished model, and what it scores."""
    _, view, scored = recipe.shown(batch, recipe.pattern)
    return view, scored


def shown_causally(recipe: Recipe, batch: Batch) -> tuple[View, Scored]:
    """The batch as it is, each token but a document's first one predicted from those before it."""
    view = AUTOREGRESSIVE.lay_out(batch, [], recipe.mask_id)
    return view, score(batch, view, [], ar_weight=1.0)


def ours(recipe: Recipe, batch: Batch) -> Tensor:
    """The loss as `Recipe.training_step` computes it."""
    return _loss(recipe, *shown(recipe, batch))


def autoregressive(recipe: Recipe, batch: Batch) -> Tensor:
    """The next-token loss of the recipe's network."""
    return _loss(recipe, *shown_causally(recipe, batch))


def _loss(recipe: Recipe, view: View, scored: Scored) -> Tensor:
    return recipe.denoiser(view.to(recipe.device), *scored.to(recipe.device))[0]


def packed(count: int, length: int, documents: int, token_ids: Sequence[int]) -> Batch:
    """Full rows of so many documents of nearly equal length, of random tokens, with their noise."""
    check_documents(documents, length)
    batch = rows(count, length)
    index_L = torch.arange(length)
    document_L = index_L * documents // length
    start_D = torch.searchsorted(document_L, torch.arange(documents))
    position_BL = (index_L - start_D[document_L]).repeat(count, 1)
    generator = torch.Generator().manual_seed(0)
    drawn_BL = torch.randint(len(token_ids), (count, length), generator=generator)
    return batch._replace(
        ids_BL=torch.tensor(token_ids)[drawn_BL],
        position_BL=position_BL,
        document_BL=document_L.repeat(count, 1),
        maskable_BL=position_BL > 0,
    )


def check_documents(documents: int, length: int) -> None:
    """ValueError for a number of documents that a row does not hold."""
    if not 1 <= documents <= length // 2:
        raise ValueError(f"documents must lie between 1 and half of data.row_length, {length // 2}, not {documents}")


class Step:
    """Training steps on one network, one optimizer and one batch, whichever arm gives the loss.

    The learning rate is 0: AdamW does all of its work, and every arm finds the same weights. Where the recipe has its
    layers compiled, baselines have them as they are: frozen.
    """

    def __init__(self, prepared: Prepared, documents: int = 1) -> None:
        self.recipe, trainer = prepared.recipe, prepared.trainer
        self.device: torch.device = trainer.strategy.root_device
        torch.manual_seed(0)
        self.recipe.configure_model()
        denoiser = self.recipe.to(self.device).denoiser.train()
        readout.require(self.recipe.head, denoiser.network, self.device)
        if self.recipe.compiled:
            compile_layers(denoiser.network, self.device)
        self.precision = trainer.precision_plugin  # not before: building the network may settle it
        self.optimizer: torch.optim.Optimizer = self.recipe.configure_optimizers()["optimizer"]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.clip = (trainer.gradient_clip_val or 0.0, trainer.gradient_clip_algorithm)
        self.batch = packed(prepared.data.batch_size, prepared.data.row_length, documents, denoiser.token_ids)
        self._there = Batch(*(tensor.to(self.device) for tensor in self.batch))
        self.tokens = int(self.batch.maskable_BL.sum())
        with self.precision.forward_context():
            view, _ = shown(self.recipe, self.batch)
            attention.require(self.recipe.backend, view.to(self.device), self.recipe.predicate, denoiser.network.dtype)

    def __call__(self, arm: Arm) -> Tensor:
        """One step by an arm; returns its loss per maskable token."""
        self.optimizer.zero_grad()
        layers = torch.compiler.set_stance("force_eager" if arm.name in BASELINES else "default")
        with self.precision.forward_context(), layers:
            loss = arm.loss(self.recipe, self.batch if arm.from_host else self._there) / self.tokens
        loss.backward()
        self._clip()
        self.optimizer.step()
        return loss.detach()

    def _clip(self) -> None:
        most, algorithm = self.clip
        how: dict[str, Any] = {"gradient_clip_algorithm": algorithm} if algorithm else {}
        self.precision.clip_gradients(self.optimizer, most, **how)


def check(losses: dict[str, float]) -> None:
    """Refuse arms that do not compute the same: a ratio of their times would mean nothing."""
    for name, loss in losses.items():
        if name != AR and not abs(loss - losses[OURS]) <= SAME * abs(losses[OURS]):
            raise ValueError(f"the baseline {name} gives a loss of {loss:.6g}, and ours is {losses[OURS]:.6g}")
