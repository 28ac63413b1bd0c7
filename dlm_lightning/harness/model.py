"""A Denoiser as lm-evaluation-harness sees a model: likelihoods by the block-wise bound, generations by a plan.

    log p(continuation | context) ≥ −Σ_b E_{t, x̃^b} [ L'/k Σ_{masked i} −log p(x^i | x^{<b}, x̃^b) ]

over the blocks b that hold the continuation, all of whose tokens are scored; `chain` is the chain rule from left to
right instead, which is exact.

Shapes: B requests, L tokens of the longest one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.sampling import Sampling
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.likelihood import Blocks, bound, turns
from dlm_lightning.noise import STRATA, uniforms
from dlm_lightning.view import AUTOREGRESSIVE, Batch

STREAM = 6  # of the noise
WHOLE = 32  # tokens per block of a bound for a model without blocks
STEP = 256  # tokens by which rows grow on a GPU
NEW_TOKENS = 256  # where a task says nothing
Pair = tuple[list[int], list[int]]  # context and continuation


@dataclass(frozen=True)
class Estimate:
    """How a likelihood is taken.

    method: `bound`, or `chain`, the chain rule from left to right: as many passes as a block has tokens.
    samples: noise draws of a bound, averaged; they share out the noise levels among them, 16 at a time.
    seed: of the noise. Choices of one question have the same noise, position by position.
    """

    method: Literal["bound", "chain"] = "bound"
    samples: int = STRATA
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("bound", "chain"):
            raise ValueError(f"--likelihood must be bound or chain, not {self.method}")
        if self.samples < 1:
            raise ValueError(f"--samples must be at least 1, not {self.samples}")


class HarnessModel(LM):
    """A Denoiser as the harness sees a model.

    Args:
        denoiser: with weights, on its device.
        tokenizer: its tokenizer, with an end-of-text token, which stands for an empty context.
        plan: how texts are generated; a request's own stop strings, length and temperature go before it.
        estimate: how likelihoods are taken.
        length: tokens that the model is shown at most; contexts lose their beginning.
        batch: requests at a time.
        template: a chat template, where the tokenizer has none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: Any,
        plan: Plan,
        estimate: Estimate = Estimate(),
        length: int = 2048,
        batch: int = 8,
        template: str | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.tokenizer, self.plan, self.estimate = denoiser, tokenizer, plan, estimate
        self.length, self.batch, self.template = length, batch, template
        self._device = next(denoiser.parameters()).device
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    # Likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation, and whether greedy decoding by the plan would have written it."""
        pairs = [self.pair(*request.args) for request in requests]
        numbers = [request.doc_id if request.doc_id is not None else n for n, request in enumerate(requests)]
        likelihoods = self.score(pairs, numbers)
        greedy = self._greedy(pairs)
        return [
            (likelihood, written[: len(pair[1])] == pair[1])
            for likelihood, written, pair in zip(likelihoods, greedy, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts behind an end-of-text token, each token scored once; long ones in windows."""
        totals: list[float] = []
        for number, request in enumerate(requests):
            ids, prefix = self._ids(request.args[0]), self.tokenizer.eos_token_id
            rolling = get_rolling_token_windows(ids, prefix, self.length - 1, 1)
            windows: list[Pair] = [make_disjoint_window(window) for window in rolling]
            place = request.doc_id if request.doc_id is not None else number
            totals.append(sum(self.score(windows, [place] * len(windows))))
        return totals

    def pair(self, context: str, continuation: str) -> Pair:
        """Tokens of both; a context's last spaces are tokenised with the continuation, as words begin with them."""
        spaces = len(context) - len(context.rstrip())
        if spaces and context.strip():
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self._ids(context)
        whole = self._ids(context + continuation)
        pair = (before, whole[len(before) :]) if whole[: len(before)] == before else (before, self._ids(continuation))
        return pair[0] or [self.tokenizer.eos_token_id], pair[1]

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> list[float]:
        """log p(continuation | context) of each pair, in nats; `numbers` name the noise, the same for the same number.

        A continuation longer than what the model is shown at most loses its beginning to a context of one token.
        """
        found = [0.0] * len(pairs)
        by_length = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
        for first in range(0, len(by_length), self.batch):
            chosen = by_length[first : first + self.batch]
            rows = [self._fitting(pairs[n]) for n in chosen]
            totals = self._score(rows, [numbers[n] for n in chosen])
            for n, total in zip(chosen, totals, strict=True):
                found[n] = total
        return found

    def _fitting(self, pair: Pair) -> Pair:
        context, continuation = pair
        continuation = continuation[-(self.length - 1) :]
        return context[-(self.length - len(continuation)) :], continuation

    def _score(self, rows: Sequence[Pair], numbers: Sequence[int]) -> list[float]:
        exact = self.denoiser.pattern == AUTOREGRESSIVE
        blocks = Blocks(1 if exact or self.estimate.method == "chain" else self.denoiser.pattern.block_size or WHOLE)
        draws = 1 if blocks.size == 1 else self.estimate.samples
        total_B = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        for draw in range(draws):
            batch = self._lay_out(rows, numbers, draw)
            for turn in range(turns(self.denoiser, batch, blocks)):
                total_B += bound(self.denoiser, batch, blocks, turn).share_BL.double().sum(1)
        return (-total_B / draws).tolist()

    def _lay_out(self, rows: Sequence[Pair], numbers: Sequence[int], draw: int) -> Batch:
        """A row per pair, padded; only continuations are maskable."""
        L = self._row_length(max(len(context) + len(continuation) for context, continuation in rows))
        ids_BL = torch.full((len(rows), L), self.tokenizer.eos_token_id)
        document_BL = (-1 - torch.arange(L)).repeat(len(rows), 1)
        maskable_BL = torch.zeros(len(rows), L, dtype=torch.bool)
        for b, (context, continuation) in enumerate(rows):
            end = len(context) + len(continuation)
            ids_BL[b, :end] = torch.tensor([*context, *continuation])
            document_BL[b, :end] = 0
            maskable_BL[b, len(context) : end] = True
        # by place and epoch, so that draws of one question are stratified as consecutive samples are
        noise = [uniforms(self.estimate.seed, STREAM, draw, number, 0, self.length) for number in numbers]
        u_BL, t_BL = (torch.stack(tensors)[:, :L] for tensors in zip(*noise, strict=True))
        position_BL = torch.arange(L).repeat(len(rows), 1)
        batch = Batch(ids_BL, position_BL, document_BL, maskable_BL, u_BL, t_BL, torch.tensor(numbers))
        return Batch(*(tensor.to(self._device) for tensor in batch))

    def _row_length(self, longest: int) -> int:
        """Of a batch; on a GPU one of a few, because a kernel is compiled for each."""
        return longest if self._device.type == "cpu" else min(self.length, -(-longest // STEP) * STEP)

    def _greedy(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """What the plan writes behind each context, as long as its longest continuation; each context once."""
        longest: dict[tuple[int, ...], int] = {}
        for pair in pairs:
            context, continuation = self._fitting(pair)
            longest[tuple(context)] = max(longest.get(tuple(context), 0), len(continuation))
        plan = replace(self.plan, sampling=Sampling())
        written: dict[tuple[int, ...], list[int]] = {}
        by_length = sorted(longest, key=lambda context: longest[context])
        for first in range(0, len(by_length), self.batch):
            chosen = by_length[first : first + self.batch]
            stopper = replace(plan.stopper, new_tokens=longest[chosen[-1]], eos=False, strings=())
            decoded = decode(self.denoiser, [list(c) for c in chosen], replace(plan, stopper=stopper))
            written |= {context: row.new_ids for context, row in zip(chosen, decoded.rows, strict=True)}
        return [written[tuple(self._fitting(pair)[0])] for pair in pairs]

    # Generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """By the plan, up to the first of a request's stop strings."""
        found: list[str] = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        for numbers in by_options.values():
            plan = self._plan(dict(requests[numbers[0]].args[1]))
            prompts = {n: self._prompt(requests[n].args[0], plan.stopper.new_tokens) for n in numbers}
            by_length = sorted(numbers, key=lambda n: -len(prompts[n]))
            for first in range(0, len(by_length), self.batch):
                chosen = by_length[first : first + self.batch]
                options: dict[str, Any] = {"text": self.tokenizer.decode, "eos_ids": [self.tokenizer.eos_token_id]}
                decoded = decode(self.denoiser, [prompts[n] for n in chosen], plan, first=chosen[0], **options)
                for n, row in zip(chosen, decoded.rows, strict=True):
                    found[n] = plan.stopper.cut(self.tokenizer.decode(row.new_ids, skip_special_tokens=True))
        return found

    def _plan(self, options: dict[str, Any]) -> Plan:
        until = options.get("until") or []
        strings = (until,) if isinstance(until, str) else tuple(until)
        most = options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS
        stopper = replace(self.plan.stopper, new_tokens=min(most, self.length - 1), strings=strings)
        sampling = self.plan.sampling
        if options.get("do_sample") and options.get("temperature"):
            sampling = replace(sampling, temperature=float(options["temperature"]))
        return replace(self.plan, stopper=stopper, sampling=sampling)

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        return (self._ids(context) or [self.tokenizer.eos_token_id])[-(self.length - new_tokens) :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # Chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the harness's records."""
        return (self.template or self.tokenizer.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """For the harness's records."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # Ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of all ranks, one after another."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat([part.reshape(-1) for part in parts])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Of all ranks, on one of them."""
        if self.world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()
