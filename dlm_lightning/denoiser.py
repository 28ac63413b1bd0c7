"""The Denoiser: a decoder-only transformers model that is shown views and predicts the tokens asked for.

Shapes: B rows, S tokens of a row of the view, K tokens of a row that the view looks at (S, or with a cache its slots),
N tokens asked for, D hidden size, V vocabulary, X of its rows that are banned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlm_lightning import attention, readout
from dlm_lightning.cache import Cache
from dlm_lightning.source import decoder_layers
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, View, predictors, sees


class Denoiser(nn.Module):
    """Sole caller of the Hugging Face network, for training, validation and decoding; owns mask token and token shift.

    Args:
        network: a causal language model built with `attn_implementation=attention.NAME`.
        mask_id: the row of the embedding that stands for a masked token.
        token_ids: the ids that the tokenizer knows; all other rows, and the mask, are never predicted.
        shift: `next_token` reads a masked token from the hidden state before it, `none` from its own.
        first_token: with shift, from which copy the first token of a block is read (see `view.predictors`).
        predicate: who sees whom, called as `sees(query, key)`.
        pattern: the pattern that the network was trained for, which decoders go by.
        backend: how attention is computed; see `attention.plan`.
        head: how the head's weighted sum is computed; see `readout.weighted_nll`.
    """

    banned_X: Tensor

    def __init__(
        self,
        network: PreTrainedModel,
        mask_id: int,
        token_ids: Iterable[int],
        shift: str = "none",
        first_token: str = "clean",
        predicate: Callable[[View, View], Tensor] = sees,
        pattern: Pattern = AUTOREGRESSIVE,
        backend: attention.Backend = "auto",
        head: readout.Head = "torch",
    ) -> None:
        super().__init__()
        self.network = network
        self.mask_id = mask_id
        self.shift = shift
        self.first_token = first_token
        self.predicate = predicate
        self.pattern = pattern
        self.backend = backend
        self.head = head
        self.token_ids = sorted(set(token_ids) - {mask_id})
        banned = sorted(set(range(network.config.vocab_size)) - set(self.token_ids))
        self.register_buffer("banned_X", torch.tensor(banned, dtype=torch.long), persistent=False)

    @overload
    def forward(
        self, view: View, keep_N: Tensor, target_N: Tensor | None = None, *, cache: Cache | None = None
    ) -> Tensor: ...

    @overload
    def forward(self, view: View, keep_N: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        view: View,
        keep_N: Tensor,
        target_N: Tensor | None = None,
        weight_N: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [N, V] of the tokens at the flat indices `keep_N` of [B·S], or with targets their −log p [N].

        With weights the sum Σ w·(−log p), which has a gradient, and each −log p, which has none. No tensor of N × V is
        kept. Tokens without a predecessor (the first of a document in its row, under shift) must not be asked for.

        With a cache, of P positions, `keep_N` are flat indices of [B·P]: positions, whether shown now or not. One that
        was shown as the mask last is read as in training, all others from the position before.
        """
        keys = view if cache is None else cache.show(view)
        if cache is None:
            S = view.ids_BS.shape[1]
            read_BS = predictors(view, self.mask_id, self.shift, self.first_token)
            read_N = keep_N // S * S + read_BS.flatten()[keep_N].clamp(min=0)
            last = decoder_layers(self.network)[-1]
            with readout.read_alone(last, read_N, view.ids_BS.numel()):
                hidden_ND = self._hidden(view, keys).flatten(0, 1)[read_N]
        else:
            row_N, position_N = keep_N // cache.positions, keep_N % cache.positions
            hidden_BPD = cache.remember(self._hidden(view, keys, cache))
            own_N = (cache.ids_BP[row_N, position_N] == self.mask_id) & (self.shift == "none")
            hidden_ND = hidden_BPD[row_N, position_N - (~own_N).long()]
        if target_N is None:
            return readout.logits(self.network, hidden_ND, self.banned_X)
        if weight_N is None:
            return readout.nll(self.network, hidden_ND, target_N, self.banned_X)
        return readout.weighted_nll(self.network, hidden_ND, target_N, weight_N, self.banned_X, self.head)

    def _hidden(self, view: View, keys: View, cache: Cache | None = None) -> Tensor:
        """The network's last hidden states [B, S, D], behind its final norm."""
        return self.network.base_model(
            input_ids=view.ids_BS,
            position_ids=view.position_BS,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_plan=self.plan(view, keys),
        ).last_hidden_state

    def plan(self, view: View, keys: View) -> attention.Plan:
        """Who sees whom in all layers of a forward."""
        return attention.plan(view, self.predicate, keys, self.network.dtype, self.backend)
