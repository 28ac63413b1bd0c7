"""The Denoiser: a decoder-only transformers model that is shown views and predicts the tokens asked for.

Shapes: B rows, S tokens of a row of the view, K tokens of a row that the view looks at (S, and before them the cached
context), N tokens asked for, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from dlm_lightning import attention
from dlm_lightning.view import View, predictors, sees

CHUNK = 2048  # tokens whose logits exist at the same time


class Cache:
    """The context that forwards with this cache have seen: keys and values of each layer, coordinates, hidden states.

    Each forward adds its tokens of copy 0, which come first in its view, and leaves nothing of its noisy copies. Logits
    are those of a forward without a cache as long as no token that is kept sees one that is shown later.
    """

    def __init__(self) -> None:
        self.layers = DynamicCache()
        self.views: list[View] = []  # by the forward that added them, as are the hidden states
        self.hidden_BSD: list[Tensor] = []

    @property
    def size(self) -> int:
        """Tokens per row."""
        return sum(view.ids_BS.shape[1] for view in self.views)

    def beside(self, view: View) -> View:
        """The context and then the view, [B, K]; ValueError unless the view's copy 0 is its first columns."""
        context_BS = view.copy_BS == 0
        if (context_BS.any(0) != context_BS.all(0)).any() or (context_BS[:, 1:] & ~context_BS[:, :-1]).any():
            raise ValueError("with a cache, tokens of copy 0 come before all others, in the same columns of all rows")
        return View.beside([*self.views, view])

    def extend(self, view: View, hidden_BSD: Tensor) -> Tensor:
        """Keep a forward's tokens of copy 0 and drop the others; returns the hidden states [B, K, D] of `beside`."""
        hidden_BKD = torch.cat([*self.hidden_BSD, hidden_BSD], dim=1)
        size = int((view.copy_BS[0] == 0).sum())
        self.layers.crop(size - view.ids_BS.shape[1])
        if size:
            self.views.append(view[:, :size])
            self.hidden_BSD.append(hidden_BSD[:, :size])
        return hidden_BKD


class Denoiser(nn.Module):
    """Sole caller of the Hugging Face network, for training, validation and decoding; owns mask token and token shift.

    Args:
        network: a causal language model built with `attn_implementation=attention.NAME`.
        mask_id: the row of the embedding that stands for a masked token.
        token_ids: the ids that the tokenizer knows; all other rows, and the mask, are never predicted.
        shift: `next_token` reads a masked token from the hidden state before it, `none` from its own.
        first_token: with shift, from which copy the first token of a block is read (see `view.predictors`).
        predicate: who sees whom, called as `sees(query, key)`.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        mask_id: int,
        token_ids: Iterable[int],
        shift: str = "none",
        first_token: str = "clean",
        predicate: Callable[[View, View], Tensor] = sees,
    ) -> None:
        super().__init__()
        self.network = network
        self.mask_id = mask_id
        self.shift = shift
        self.first_token = first_token
        self.predicate = predicate
        self.token_ids = sorted(set(token_ids) - {mask_id})
        banned_V = torch.ones(network.config.vocab_size, dtype=torch.bool)
        banned_V[self.token_ids] = False
        self.register_buffer("banned_V", banned_V, persistent=False)

    def forward(self, view: View, keep_N: Tensor, target_N: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [N, V] of the tokens at the flat indices `keep_N` of [B·S], or with targets their −log p [N].

        −log p is computed chunk by chunk and recomputed in the backward pass: no tensor of N × V is kept. Tokens
        without a predecessor (the first of a document in its row, under shift) must not be asked for.

        With a cache the view holds only tokens that are new, and looks at the cached context too; afterwards its tokens
        of copy 0 are part of that context. ValueError if they are not its first columns.
        """
        keys = view if cache is None else cache.beside(view)
        hidden_BSD = self.network.base_model(
            input_ids=view.ids_BS,
            position_ids=view.position_BS,
            past_key_values=None if cache is None else cache.layers,
            use_cache=cache is not None,
            attention_plan=attention.plan(view, self.predicate, keys, self.network.dtype),
        ).last_hidden_state
        hidden_BKD = hidden_BSD if cache is None else cache.extend(view, hidden_BSD)
        S, K = view.ids_BS.shape[1], keys.ids_BS.shape[1]
        read_BS = predictors(keys, self.mask_id, self.shift, self.first_token)[:, K - S :]
        row_N = keep_N // S * K
        hidden_ND = hidden_BKD.flatten(0, 1)[row_N + read_BS.flatten()[keep_N]]
        if target_N is None:
            return self._logits(hidden_ND)
        chunks = zip(hidden_ND.split(CHUNK), target_N.split(CHUNK), strict=True)
        return torch.cat([checkpoint(self._nll, *chunk, use_reentrant=False) for chunk in chunks])

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """The network's own readout, with what some families do to the logits after the head (a probe compares)."""
        config = self.network.config
        logits_NV = self.network.get_output_embeddings()(hidden_ND).float()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        if scale != 1:
            logits_NV = logits_NV * scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits_NV = cap * torch.tanh(logits_NV / cap)
        return logits_NV.masked_fill_(self.banned_V, -torch.inf)

    def _nll(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden_ND), target_N, reduction="none")
