"""The Denoiser: a decoder-only transformers model that is shown views and predicts the tokens asked for.

Shapes: B rows, S tokens of a row of the view, N tokens asked for, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dlm_lightning import attention
from dlm_lightning.view import View, predictors, sees

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
        banned_V = torch.ones(network.config.vocab_size, dtype=torch.bool)
        banned_V[sorted(set(token_ids) - {mask_id})] = False
        self.register_buffer("banned_V", banned_V, persistent=False)

    def forward(self, view: View, keep_N: Tensor, target_N: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the tokens at the flat indices `keep_N` of [B·S], or with targets their −log p [N].

        −log p is computed chunk by chunk and recomputed in the backward pass: no tensor of N × V is kept. Tokens
        without a predecessor (the first of a document in its row, under shift) must not be asked for.
        """
        hidden_BSD = self.network.base_model(
            input_ids=view.ids_BS,
            position_ids=view.position_BS,
            use_cache=False,
            attention_plan=attention.plan(view, self.predicate),
        ).last_hidden_state
        read_BS = predictors(view, self.mask_id, self.shift, self.first_token)
        row_N = keep_N // view.ids_BS.shape[1] * view.ids_BS.shape[1]
        hidden_ND = hidden_BSD.flatten(0, 1)[row_N + read_BS.flatten()[keep_N]]
        if target_N is None:
            return self._logits(hidden_ND)
        chunks = zip(hidden_ND.split(CHUNK), target_N.split(CHUNK), strict=True)
        return torch.cat([checkpoint(self._nll, *chunk, use_reentrant=False) for chunk in chunks])

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = self.network.get_output_embeddings()(hidden_ND).float()
        return logits_NV.masked_fill_(self.banned_V, -torch.inf)

    def _nll(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden_ND), target_N, reduction="none")
