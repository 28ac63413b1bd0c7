"""The Denoiser: a decoder-only transformers model that is shown views and predicts the tokens asked for.

Shapes: B rows, S tokens of a row of the view, K tokens of a row that the view looks at (S, or with a cache its slots),
N tokens asked for, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dlm_lightning import attention
from dlm_lightning.cache import Cache
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, View, predictors, sees

CHUNK = 2048  # tokens whose logits exist at the same time


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
    """

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
    ) -> None:
        super().__init__()
        self.network = network
        self.mask_id = mask_id
        self.shift = shift
        self.first_token = first_token
        self.predicate = predicate
        self.pattern = pattern
        self.backend = backend
        self.token_ids = sorted(set(token_ids) - {mask_id})
        banned_V = torch.ones(network.config.vocab_size, dtype=torch.bool)
        banned_V[self.token_ids] = False
        self.register_buffer("banned_V", banned_V, persistent=False)

    def forward(self, view: View, keep_N: Tensor, target_N: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [N, V] of the tokens at the flat indices `keep_N` of [B·S], or with targets their −log p [N].

        −log p is computed chunk by chunk and recomputed in the backward pass: no tensor of N × V is kept. Tokens
        without a predecessor (the first of a document in its row, under shift) must not be asked for.

        With a cache, of P positions, `keep_N` are flat indices of [B·P]: positions, whether shown now or not. One that
        was shown as the mask last is read as in training, all others from the position before.
        """
        keys = view if cache is None else cache.show(view)
        hidden_BSD = self.network.base_model(
            input_ids=view.ids_BS,
            position_ids=view.position_BS,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_plan=attention.plan(view, self.predicate, keys, self.network.dtype, self.backend),
        ).last_hidden_state
        if cache is None:
            read_BS = predictors(view, self.mask_id, self.shift, self.first_token)
            S = view.ids_BS.shape[1]
            hidden_ND = hidden_BSD.flatten(0, 1)[keep_N // S * S + read_BS.flatten()[keep_N]]
        else:
            row_N, position_N = keep_N // cache.positions, keep_N % cache.positions
            own_N = (cache.ids_BP[row_N, position_N] == self.mask_id) & (self.shift == "none")
            hidden_ND = cache.remember(hidden_BSD)[row_N, position_N - (~own_N).long()]
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
