"""The baselines: the same loss, computed in two plain ways. They are frozen, so that figures of different days compare.

Both lay complementary copies out as rows of their own, [noisy 1; clean] and [noisy 2; clean], under a dense mask, with
the recipe's own network. They import what defines a step (views, masks, the loss) and nothing that makes ours fast.

Shapes: B rows of a batch, R rows as they are laid out (B per noisy copy), S tokens of a row, N scored tokens, D hidden
size, V vocabulary; attention has H query heads and G key and value heads, of E numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_lightning.loss import Scored, score, weighted_sum
from dlm_lightning.module import Recipe
from dlm_lightning.view import Batch, Pattern, View, attention_mask, predictors

Loss = Callable[[Recipe, Batch], Tensor]
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # keys of configs


@dataclass(frozen=True)
class DenseMask:
    """An attention plan: one call of torch's attention in each layer, under a bool mask [R or 1, 1, S, S]."""

    mask_R1SS: Tensor

    def attend(
        self,
        q_RHSE: Tensor,
        k_RGSE: Tensor,
        v_RGSE: Tensor,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention [R, S, H, E]; keys and values are repeated for their query heads, as transformers does it."""
        if window is not None or softcap is not None:
            raise ValueError("a baseline has no sliding windows and no capped attention scores, as this model needs")
        share = q_RHSE.shape[1] // k_RGSE.shape[1]
        k_RHSE, v_RHSE = (x.repeat_interleave(share, dim=1) if share > 1 else x for x in (k_RGSE, v_RGSE))
        out_RHSE = F.scaled_dot_product_attention(q_RHSE, k_RHSE, v_RHSE, attn_mask=self.mask_R1SS, scale=scaling)
        return out_RHSE.transpose(1, 2).contiguous()


def peers(recipe: Recipe, batch: Batch) -> Tensor:
    """The loss as peers compute it (dllm; pairs as in Fast-dLLM v2): mask anew, logits of all tokens, then sliced."""
    view, scored = _lay_out(recipe, batch)
    hidden_RSD = _hidden(recipe, view, _dense_mask(recipe, view))
    logits_RSV = recipe.denoiser.network.get_output_embeddings()(hidden_RSD)
    return _loss(recipe, logits_RSV.flatten(0, 1)[_read(recipe, view, scored)], scored)


class Fair:
    """The loss in the same layout, its mask kept for as long as batches lie alike, and logits of scored tokens only."""

    def __init__(self) -> None:
        self._laid: tuple[Pattern, Tensor, Tensor] | None = None
        self._mask: DenseMask | None = None

    def __call__(self, recipe: Recipe, batch: Batch) -> Tensor:
        view, scored = _lay_out(recipe, batch)
        hidden_RSD = _hidden(recipe, view, self._mask_of(recipe, batch, view))
        hidden_ND = hidden_RSD.flatten(0, 1)[_read(recipe, view, scored)]
        return _loss(recipe, recipe.denoiser.network.get_output_embeddings()(hidden_ND), scored)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What takes memory between two steps."""
        return (self._mask.mask_R1SS,) if self._mask else ()

    def _mask_of(self, recipe: Recipe, batch: Batch, view: View) -> DenseMask:
        """The mask of the last batch if this one has its very coordinates; to compare values would wait for a GPU."""
        laid = (recipe.pattern, batch.position_BL, batch.document_BL)
        if self._mask is None or self._laid is None or any(a is not b for a, b in zip(laid, self._laid, strict=True)):
            self._laid, self._mask = laid, _dense_mask(recipe, view)
        return self._mask


BASELINES: dict[str, Callable[[], Loss]] = {"peers": lambda: peers, "fair": Fair}


def _lay_out(recipe: Recipe, batch: Batch) -> tuple[View, Scored]:
    """Each noisy copy in rows of its own; an AR loss, if there is one, is taken on the first clean copy."""
    copies = recipe.noisy(batch, recipe.pattern)
    views, parts = [], []
    for n, own in enumerate([[copy] for copy in copies] or [[]]):
        view = recipe.show(batch, own, recipe.pattern)
        index_N, target_N, weight_N = score(batch, view, own, 0.0 if n else recipe.ar_weight)
        views.append(view)
        parts.append(Scored(index_N + n * view.ids_BS.numel(), target_N, weight_N))
    ids, position, rank, order, copy, document = map(torch.cat, zip(*(v.coordinates for v in views), strict=True))
    return View(ids, position, rank, order, copy, document), Scored(
        *(torch.cat(part) for part in zip(*parts, strict=True))
    )


def _dense_mask(recipe: Recipe, view: View) -> DenseMask:
    """One mask for all rows if they are laid out alike, as rows of one document are, or else a mask each."""
    coordinates = view.coordinates[1:]
    alike = torch.stack([(rows == rows[:1]).all() for rows in coordinates]).all()
    mask_RSS = attention_mask(view[:1, :] if alike else view, recipe.predicate)
    return DenseMask(mask_RSS.unsqueeze(1))


def _hidden(recipe: Recipe, view: View, mask: DenseMask) -> Tensor:
    network = recipe.denoiser.network
    return network.base_model(
        input_ids=view.ids_BS, position_ids=view.position_BS, use_cache=False, attention_plan=mask
    ).last_hidden_state


def _read(recipe: Recipe, view: View, scored: Scored) -> Tensor:
    """Flat indices into [R·S] of the tokens that the scored ones are predicted from."""
    denoiser = recipe.denoiser
    read_RS = predictors(view, denoiser.mask_id, denoiser.shift, denoiser.first_token)
    S = view.ids_BS.shape[1]
    return scored.index_N // S * S + read_RS.flatten()[scored.index_N]


def _loss(recipe: Recipe, logits_NV: Tensor, scored: Scored) -> Tensor:
    config = recipe.denoiser.network.config
    if any(getattr(config, key, None) not in (None, 1) for key in AFTER_THE_HEAD):
        raise ValueError("a baseline neither scales nor caps logits, as this model needs")
    logits_NV = logits_NV.float().index_fill(1, recipe.denoiser.banned_X, -torch.inf)
    return weighted_sum(F.cross_entropy(logits_NV, scored.target_N, reduction="none"), scored.weight_N)
