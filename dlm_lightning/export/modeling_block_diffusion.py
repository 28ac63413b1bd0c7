"""A block diffusion language model on plain transformers: an autoregressive network under another attention mask.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    ids = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=64)

Masks after the prompt are filled in block by block, several in a forward. What the model is, `config.dlm` says:

    block_size: tokens per block, which lie on a document's positions; null: all tokens see each other.
    context, context_rank: whether earlier blocks are seen `clean`, and then by whole `block`s or `causal`, by token.
    shift: `next_token`: a mask is predicted from the position before it; `none`: from its own.
    mask_id: the token that stands for what is to be filled in.
    banned: spans [from, to) of ids that are no tokens, which are never predicted.

Shapes: B rows, S tokens of a row that a forward shows, K tokens that it looks at, N masks, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

DRAWS = 10  # names the stream of random numbers
IGNORED, ONE = ("token_type_ids", "use_cache"), ("num_beams", "num_return_sequences")  # of what transformers' own takes


class BlockDiffusionConfig(Qwen3Config):
    """The network's own config, and in `dlm` how it is read."""

    model_type = "dlm_qwen3"

    @property
    def rope_theta(self) -> float:
        """For engines that know no `rope_parameters`; without it they would take another one and say nothing."""
        rope = getattr(self, "rope_parameters", None) or {}
        if "rope_theta" not in rope:  # of models that have several
            raise AttributeError("rope_theta")
        return rope["rope_theta"]


class BlockDiffusionForCausalLM(Qwen3ForCausalLM):
    """The network's own layers and weights. A mask is given to attention, which kernels without masks cannot take."""

    config_class = BlockDiffusionConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: BlockDiffusionConfig) -> None:
        check(config)
        super().__init__(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        start: int | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of tokens [B, S], which come after those in the cache; of masks, at the position that predicts them.

        `attention_mask` [B, K] is 0 for padding. The block at position `start` is being filled in, by default that of a
        row's first mask; what lies before it is its context. There is no loss: one for the next token would mislead.
        """
        if options.get("labels") is not None:
            raise ValueError("this model has no loss of its own; how it was trained, the code that exported it knows")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        B, S = input_ids.shape
        there_BK = torch.ones(B, past + S, device=input_ids.device) if attention_mask is None else attention_mask
        there_BK = there_BK.bool()
        position_BK = (there_BK.long().cumsum(1) - 1).clamp(min=0)
        position_BS = position_BK[:, past:]
        size, end = self.config.dlm["block_size"], past + S
        if start is None:
            masked_BS = (input_ids == self.config.dlm["mask_id"]) & there_BK[:, past:]
            first_B1 = torch.where(masked_BS, position_BS, end).amin(1, keepdim=True)
            start_B1 = first_B1 if size is None else first_B1 // size * size
        else:
            start_B1 = torch.full_like(position_BK[:, :1], start)
        seen_BSK = self._sees(position_BS, position_BK, start_B1) & there_BK[:, None]
        return super().forward(
            input_ids=input_ids,
            attention_mask=self._masks(seen_BSK, position_BS, position_BK),
            position_ids=position_BS,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **options,
        )

    def _sees(self, q_BS: Tensor, k_BK: Tensor, start_B1: Tensor) -> Tensor:
        """Whether tokens at positions q see those at positions k: bool [B, S, K]."""
        pattern = self.config.dlm
        size = pattern["block_size"]
        if size is None:
            return torch.ones(*q_BS.shape, k_BK.shape[1], dtype=torch.bool, device=q_BS.device)

        def placed(position_BN: Tensor) -> tuple[Tensor, Tensor]:
            """The rank at which tokens are seen, and whether they are context, which later ranks see."""
            rank_BN = position_BN // size * size
            if pattern["context"] != "clean":
                return rank_BN, torch.ones_like(rank_BN, dtype=torch.bool)
            context_BN = position_BN < start_B1
            causal = pattern["context_rank"] == "causal"
            return torch.where(context_BN, position_BN, rank_BN) if causal else rank_BN, context_BN

        (rank_BS, context_BS), (rank_BK, context_BK) = placed(q_BS), placed(k_BK)
        before_BSK = (rank_BK[:, None] < rank_BS[..., None]) & context_BK[:, None]
        group_BSK = (rank_BK[:, None] == rank_BS[..., None]) & (context_BK[:, None] == context_BS[..., None])
        return before_BSK | group_BSK

    def _masks(self, seen_BSK: Tensor, q_BS: Tensor, k_BK: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to attention scores, [B, 1, S, K], for each kind of layers where there are several."""

        def added(seen: Tensor) -> Tensor:
            zero = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
            return zero.masked_fill(~seen, torch.finfo(self.dtype).min)[:, None]

        kinds = set(getattr(self.config, "layer_types", None) or [])
        window = getattr(self.config, "sliding_window", None)
        if window is None or kinds == {"full_attention"}:
            return added(seen_BSK)
        near = added(seen_BSK & ((q_BS[..., None] - k_BK[:, None]).abs() < window))
        return {"full_attention": added(seen_BSK), "sliding_attention": near} if kinds else near

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        threshold: float = 0.9,
        block_size: int | None = None,
        forwards: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        **others: Any,
    ) -> Tensor:
        """Continue prompts [B, S], a row after the other; returns them with their new tokens, padded on the right.

        Args:
            input_ids: prompts. Masks in them are filled in, too.
            attention_mask: 0 for the padding of prompts, which belongs on the left.
            max_new_tokens: at most, 128 if the generation config does not say; a row ends with its first end-of-text
                token.
            threshold: a forward fills in every mask of its block whose token is likelier, and at least the likeliest.
            block_size, forwards: of a model whose tokens all see each other: it fills in blocks of so many tokens (32),
                each in so many forwards (16).
            temperature, top_p, top_k, seed: how tokens are drawn; 0 takes the likeliest.
            **others: what transformers knows besides is refused, unless it asks for nothing.
        """
        dlm, config = self.config.dlm, self.generation_config
        if max_new_tokens is None:
            max_new_tokens = 128 if config.max_new_tokens is None else config.max_new_tokens
        if dlm["block_size"] is not None and (block_size, forwards) != (None, None):
            raise ValueError(f"block_size and forwards are not asked for: this model has blocks of {dlm['block_size']}")
        size, forwards = 32 if block_size is None else block_size, 16 if forwards is None else forwards
        check_asked(others, max_new_tokens, threshold, size, forwards, temperature, top_p, top_k, seed)
        check_prompts(self.config, input_ids, attention_mask, max_new_tokens)
        rows = []
        for number, row_S in enumerate(input_ids.long()):
            there_S = torch.ones_like(row_S) if attention_mask is None else attention_mask[number]
            prompt_S = row_S[there_S.bool()]
            draw = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "number": number}
            ids_L = self._row(prompt_S, max_new_tokens, (threshold, size, forwards), draw)
            filled_S = row_S.masked_scatter(there_S.bool(), ids_L[: len(prompt_S)])
            rows.append(torch.cat([filled_S, ids_L[len(prompt_S) :]]))
        pad = config.pad_token_id
        pad = next(iter(self._ends(input_ids.device).tolist()), 0) if pad is None else pad
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad) if rows else input_ids

    def _row(self, prompt_S: Tensor, new: int, options: tuple[float, int, int], draw: dict[str, Any]) -> Tensor:
        """A prompt and its new tokens."""
        dlm, (threshold, size, forwards) = self.config.dlm, options
        shifted, ahead = dlm["shift"] == "next_token", dlm["block_size"] is None
        size = size if ahead else dlm["block_size"]
        ids_L = torch.cat([prompt_S, prompt_S.new_full((new,), dlm["mask_id"])])
        ends, position_L = self._ends(ids_L.device), torch.arange(len(ids_L), device=ids_L.device)
        cache = None if ahead else DynamicCache()
        made = final = start = stop = of_block = 0
        while True:
            masked_L = ids_L == dlm["mask_id"]
            first = int(masked_L.long().argmax()) if masked_L.any() else len(ids_L)
            ended = torch.isin(ids_L[len(prompt_S) : first], ends).nonzero()
            if len(ended) or first == len(ids_L):
                return ids_L[: len(prompt_S) + int(ended[0]) + 1] if len(ended) else ids_L
            if first >= stop:
                start, of_block = first // size * size, 0
                stop = min(start + size, len(ids_L))
            shown = slice(final, len(ids_L) if ahead else stop)
            at_N = position_L[masked_L & (position_L >= start) & (position_L < stop)]
            made, of_block = made + 1, of_block + 1
            out: Any = self.forward(
                ids_L[None, shown],
                past_key_values=cache,
                use_cache=cache is not None,
                start=start,
                logits_to_keep=at_N - int(shifted) - final,
            )
            logits_NV = out.logits[0].float()
            for begin, end in dlm["banned"]:
                logits_NV[:, begin:end] = -torch.inf
            token_N = _drawn(logits_NV, at_N, len(ids_L), made, **draw)
            score_N = logits_NV.softmax(1).gather(1, token_N[:, None])[:, 0]
            if cache is None:
                left = max(1, forwards + 1 - of_block)
                count = -(-len(at_N) // left)
            else:
                if shifted:  # predicted from the context, where nothing changes any more
                    score_N = score_N.masked_fill(at_N == start, torch.inf)
                count = max(1, int((score_N > threshold).sum()))
                cache.crop(start - stop)  # the block will be shown again
                final = start
            chosen_N = score_N.argsort(descending=True, stable=True)[:count]
            ids_L[at_N[chosen_N]] = token_N[chosen_N]

    def _ends(self, device: torch.device) -> Tensor:
        """The end-of-text tokens."""
        ids = self.generation_config.eos_token_id
        return torch.tensor(ids if isinstance(ids, list) else [] if ids is None else [ids], device=device)


def _drawn(
    logits_NV: Tensor,
    at_N: Tensor,
    length: int,
    forward: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
    number: int,
) -> Tensor:
    """A token for each mask; what is drawn depends on the seed, the row's number, its forwards, and the position."""
    if temperature == 0:
        return logits_NV.argmax(1)
    above_NV = logits_NV.double() - logits_NV.amax(1, keepdim=True)
    p_NV, token_NV = (above_NV / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    kept_NV = p_NV.cumsum(1) - p_NV < top_p
    if top_k is not None:
        kept_NV[:, top_k:] = False
    sum_NV = (p_NV * kept_NV).cumsum(1)
    counter, key = np.array([0, number, forward, 0], np.uint64), np.array([seed % 2**64, DRAWS], np.uint64)
    words_L = np.random.Philox(key=key, counter=counter).random_raw(length) / 2.0**64
    u_N = torch.from_numpy(words_L).to(sum_NV)[at_N]
    place_N = (sum_NV <= (u_N * sum_NV[:, -1])[:, None]).sum(1)
    return token_NV.gather(1, place_N.clamp(max=kept_NV.sum(1) - 1)[:, None])[:, 0]


def check_asked(
    others: dict[str, Any],
    new: int,
    threshold: float,
    size: int,
    forwards: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
) -> None:
    """TypeError or ValueError, naming it, for what `generate` does not take."""
    nothing = {name for name, value in others.items() if value is None or value is False or name in IGNORED}
    nothing |= {name for name, value in others.items() if name in ONE and value == 1}
    if unknown := sorted(others.keys() - nothing):
        raise TypeError(f"generate of a block diffusion model takes no {', '.join(unknown)}")
    whole = {"max_new_tokens": (new, 0), "block_size": (size, 1), "forwards": (forwards, 1), "top_k": (top_k or 1, 1)}
    for name, (value, least) in whole.items():
        if type(value) is not int or value < least or (name, top_k) == ("top_k", 0):
            raise ValueError(f"{name} must be a whole number, at least {least}")
    for name, share in {"threshold": threshold, "top_p": top_p}.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1]")
    if not 0 <= temperature < float("inf") or type(seed) is not int:
        raise ValueError("temperature must be at least 0, and seed a whole number")


def check_prompts(config: Any, input_ids: Tensor, attention_mask: Tensor | None, new: int) -> None:
    """ValueError, naming the reason, for prompts that cannot be continued by so many tokens."""
    if input_ids.ndim != 2 or not ((input_ids >= 0) & (input_ids < config.vocab_size)).all():
        raise ValueError(f"input_ids must be a tensor [B, S] of tokens below {config.vocab_size}")
    there_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if there_BS.shape != input_ids.shape:
        raise ValueError("attention_mask must have the shape of input_ids")
    positions = getattr(config, "max_position_embeddings", None)
    for number, (row_S, row_there_S) in enumerate(zip(input_ids, there_BS.bool(), strict=True)):
        prompt_S = row_S[row_there_S]
        if not len(prompt_S) or prompt_S[0] == config.dlm["mask_id"]:
            raise ValueError(f"prompt {number} is empty or begins with the mask; a first token cannot be predicted")
        if positions and len(prompt_S) + new > positions:
            much = f"has {len(prompt_S)} tokens and {new} are to come"
            raise ValueError(f"prompt {number} {much}; the model has {positions} positions")


def check(config: Any) -> None:
    """ValueError, naming the key, for a config that does not say how the model is read."""
    dlm = getattr(config, "dlm", None)
    if not isinstance(dlm, dict):
        raise ValueError("config.json has no dlm, which says how the model is read")
    size = dlm.get("block_size")
    wrong = {
        "block_size": "block_size" not in dlm or not (size is None or (type(size) is int and size > 0)),
        "context": dlm.get("context") not in ("clean", "noisy"),
        "context_rank": dlm.get("context_rank") not in ("block", "causal"),
        "shift": dlm.get("shift") not in ("none", "next_token"),
        "mask_id": type(dlm.get("mask_id")) is not int or not 0 <= dlm["mask_id"] < config.vocab_size,
        "banned": not isinstance(dlm.get("banned"), list)
        or not all(
            isinstance(span, list)
            and [type(end) for end in span] == [int, int]
            and 0 <= span[0] < span[1]
            and span[1] <= config.vocab_size
            for span in dlm["banned"]
        ),
    }
    for key in dlm:
        if key not in wrong:
            raise ValueError(f"config.json: there is no key dlm.{key}")
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"config.json: dlm.{key} is missing or is none that there is: {dlm.get(key)}")
