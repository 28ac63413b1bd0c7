"""Decoding against transformers' own generate and decoders written with loops and a plain network."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning import attention
from dlm_lightning.attention import flash
from dlm_lightning.decode.decoder import compiled, decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import Causal, Delayed, Greedy, Nothing, Prefix, Reuse, SubBlock, exact
from dlm_lightning.decode.sampling import Sampling
from dlm_lightning.decode.selector import LeftToRight, RandomOrder, Schedule, Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, sees

MASK = 300
PROMPT = [17, 250, 3, 99, 41, 8]
PROMPTS = [PROMPT, [5], PROMPT * 2, PROMPT[:4], PROMPT[:3]]
PATTERNS = {
    "clean": Pattern(4, "clean"),
    "clean, causal rank": Pattern(4, "clean", "causal"),
    "noisy": Pattern(4, "noisy"),
    "full": Pattern(None),
}
EXACT = {"prefix": Prefix(), "causal": Causal()}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
by_shift = pytest.mark.parametrize("shift", ["none", "next_token"])


def plan(new_tokens: int = 9, threshold: float = 1.0, cache: Reuse | None = None, eos: bool = False, **parts) -> Plan:
    parts = {"selector": Threshold(threshold), "stopper": Stopper(new_tokens, eos=eos), **parts}
    return Plan(cache=cache or Nothing(), **parts)


def ids(denoiser, prompts, how: Plan) -> list[list[int]]:
    return [row.ids for row in decode(denoiser, prompts, how).rows]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("cache", [Causal(), Prefix(), Nothing()], ids=["causal", "prefix", "nothing"])
def test_block_size_1_with_shift_is_greedy_generation(make_denoiser, source_folder, family, tied, cache):
    network = AutoModelForCausalLM.from_pretrained(source_folder(family, tied))
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    expected = [network.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in PROMPTS]
    denoiser = make_denoiser(family, tied, shift="next_token")
    decoded = decode(denoiser, PROMPTS, plan(12, cache=cache))
    assert [row.ids for row in decoded.rows] == expected
    assert all(row.forwards == 12 and len(set(row.new_ids)) > 2 for row in decoded.rows)
    assert decoded.tokens_per_forward == 1
    if isinstance(cache, Causal):  # each token once, and the last one never
        assert [row.shown for row in decoded.rows] == [len(prompt) + 11 for prompt in PROMPTS]


def test_the_autoregressive_decoder_on_a_model_with_a_causal_context(make_denoiser, plain_logits):
    """Without shift, too: what stays is read for the token after it, as the free AR loss trains it."""
    denoiser = make_denoiser(shift="none", pattern=Pattern(4, "clean", "causal"))
    expected = list(PROMPT)
    for _ in range(7):
        mask = torch.ones(len(expected), len(expected), dtype=torch.bool).tril()
        logits = plain_logits(denoiser, torch.tensor(expected), torch.arange(len(expected)), mask)
        expected.append(int(logits[-1, :MASK].argmax()))
    assert ids(denoiser, [PROMPT], plan(7, cache=Causal())) == [expected]


def by_loops(plain_logits, denoiser, new_tokens: int, threshold: float, prompt=PROMPT, part=None) -> list[int]:
    """Blocks on the document's positions, filled from the surest token on, with a mask from the definition."""
    pattern = denoiser.pattern
    ids, total, block = list(prompt), len(prompt) + new_tokens, pattern.block_size or len(prompt) + new_tokens
    while len(ids) < total:
        start = len(ids) // block * block
        ids += [MASK] * (min(start + block, total) - len(ids))

        def sees(q: int, k: int, start=start) -> bool:
            causal = q < start and pattern.context_rank == "causal"
            return k <= q if causal else k // block <= q // block

        mask = torch.tensor([[sees(q, k) for k in range(len(ids))] for q in range(len(ids))])
        while MASK in ids:
            logits = plain_logits(denoiser, torch.tensor(ids), torch.arange(len(ids)), mask)[:, :300]
            guesses = {}
            first = ids.index(MASK)
            for i in (i for i, token in enumerate(ids) if token == MASK and (not part or i // part == first // part)):
                p, token = logits[i - (denoiser.shift == "next_token")].softmax(0).max(0)
                settled = denoiser.shift == "next_token" and pattern.block_size and i % block == 0
                guesses[i] = (math.inf if settled else p.item(), token.item())  # read from the finished block before
            surest = max(guesses, key=lambda i: guesses[i][0])
            for i, (p, token) in guesses.items():
                if i == surest or p > threshold:
                    ids[i] = token
    return ids


@by_pattern
@by_shift
@pytest.mark.parametrize("threshold", [1.0, 0.2])
@pytest.mark.parametrize("new_tokens", [1, 9])
@pytest.mark.parametrize("part", [None, 2])
def test_decoding_equals_a_decoder_written_with_loops(
    make_denoiser, plain_logits, pattern, shift, threshold, new_tokens, part
):
    denoiser = make_denoiser(shift=shift, pattern=pattern)
    for cache in {type(c): c for c in (Nothing(), exact(denoiser))}.values():
        decoded = decode(denoiser, PROMPTS, plan(new_tokens, threshold, cache, part_size=part))
        for row, prompt in zip(decoded.rows, PROMPTS, strict=True):
            assert row.ids == by_loops(plain_logits, denoiser, new_tokens, threshold, prompt, part)
            assert row.prompt_tokens == len(prompt) and len(row.new_ids) == new_tokens
            assert row.forwards == new_tokens if threshold == 1 else row.forwards <= new_tokens


@pytest.mark.parametrize("first_token", ["clean", "noisy"])
def test_training_on_the_noisy_predecessor_does_not_change_decoding(make_denoiser, plain_logits, first_token):
    denoiser = make_denoiser(shift="next_token", first_token=first_token, pattern=PATTERNS["clean"])
    assert ids(denoiser, [PROMPT], plan(7, cache=Prefix())) == [by_loops(plain_logits, denoiser, 7, 1.0)]


def forwards(denoiser, prompts, how: Plan):
    """What was decoded, and of each forward the tokens that passed the network and the logits."""
    widths, logits = [], []
    hooks = [
        denoiser.network.get_input_embeddings().register_forward_hook(
            lambda _, ids, __: widths.append(ids[0].shape[1])
        ),
        denoiser.register_forward_hook(lambda _, __, out: logits.append(out[:, :300])),
    ]
    decoded = decode(denoiser, prompts, how)
    for hook in hooks:
        hook.remove()
    return [row.ids for row in decoded.rows], widths, logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("shift, first_token", [("none", "clean"), ("next_token", "clean"), ("next_token", "noisy")])
@pytest.mark.parametrize("pattern", [p for p in PATTERNS.values() if p.block_size], ids=[*PATTERNS][:3])
def test_cached_decoding_equals_uncached(make_denoiser, family, shift, first_token, pattern):
    denoiser = make_denoiser(family, shift=shift, first_token=first_token, pattern=pattern)
    for prompts in ([PROMPT[:2]], [PROMPT[:4]], [PROMPT], [PROMPT * 2], PROMPTS):
        found, _, logits = forwards(denoiser, prompts, plan(9, 0.2, Prefix()))
        expected, _, expected_logits = forwards(denoiser, prompts, plan(9, 0.2))
        assert found == expected
        for cached_NV, plain_NV in zip(logits, expected_logits, strict=True):
            assert (cached_NV - plain_NV).abs().max() <= 1e-5 * plain_NV.abs().max()


def test_a_finished_block_passes_the_network_once_more(make_denoiser):
    denoiser = make_denoiser(pattern=PATTERNS["clean"])
    _, widths, _ = forwards(denoiser, [PROMPT], plan(7, cache=Prefix()))
    assert widths == [8, 4, 8, 4, 4, 4, 5]
    assert forwards(denoiser, [PROMPT], plan(7))[1] == [8, 8, 12, 12, 12, 12, 13]
    row = decode(denoiser, [PROMPT], plan(7, cache=Prefix())).rows[0]
    assert (row.shown, row.seen) == (37, 77)


def test_with_shift_a_finished_block_gives_the_first_token_of_the_next(make_denoiser):
    denoiser = make_denoiser(shift="next_token", pattern=PATTERNS["clean"])
    firsts = []

    def watch(canvas):
        if canvas.forwards_B[0] == 1:  # after the first forward of a block
            firsts.append(int(canvas.ids_BL[0, canvas.start_B[0]]))

    row = decode(denoiser, [PROMPT * 2], plan(8, cache=Prefix()), watch=watch).rows[0]
    assert firsts == [row.ids[12], row.ids[16]]


def test_exact_picks_what_the_model_allows(make_denoiser):
    assert isinstance(exact(make_denoiser(pattern=PATTERNS["clean"])), Prefix)
    assert isinstance(exact(make_denoiser(pattern=AUTOREGRESSIVE, shift="next_token")), Causal)
    assert isinstance(exact(make_denoiser(pattern=AUTOREGRESSIVE)), Prefix)
    assert isinstance(exact(make_denoiser(pattern=PATTERNS["full"])), Nothing)
    assert isinstance(exact(make_denoiser(pattern=PATTERNS["clean"], predicate=lambda q, k: sees(q, k))), Nothing)


@by_pattern
@by_shift
def test_masks_in_a_prompt_are_filled(make_denoiser, pattern, shift):
    denoiser = make_denoiser(shift=shift, pattern=pattern)
    prompt = [PROMPT[0], MASK, *PROMPT[2:], 7, 8, MASK, 9]
    found, expected = (ids(denoiser, [prompt], plan(5, cache=cache))[0] for cache in (exact(denoiser), Nothing()))
    assert found == expected and MASK not in found and len(found) == 15
    assert [token for token, asked in zip(found, prompt, strict=False) if asked != MASK] == [
        t for t in prompt if t != MASK
    ]


def test_under_a_predicate_of_its_own_a_recipe_decodes_without_a_cache(make_denoiser):
    open_context = lambda q, k: sees(q, k) | (q.copy_BS == 0)  # noqa: E731  # context that sees what comes later
    denoiser = make_denoiser(predicate=open_context, pattern=PATTERNS["clean"])
    assert forwards(denoiser, [PROMPT], plan(7))[1] == [8, 8, 12, 12, 12, 12, 13]
    for cache in (Prefix(), SubBlock(), Delayed(), Greedy(), Causal()):
        with pytest.raises(ValueError, match=r"without a cache|see only earlier ones"):
            decode(denoiser, [PROMPT], plan(7, cache=cache))


@by_pattern
@by_shift
@pytest.mark.parametrize(
    "cache", [Nothing(), Prefix(), SubBlock(), Delayed(), Greedy()], ids=lambda c: type(c).__name__
)
def test_committed_tokens_stay_and_blocks_come_in_order(make_denoiser, pattern, shift, cache):
    if pattern.block_size is None and isinstance(cache, Prefix):
        with pytest.raises(ValueError, match="the prefix cache needs blocks"):
            decode(make_denoiser(shift=shift, pattern=pattern), PROMPTS, plan(cache=cache))
        return
    known: dict[int, list[int]] = dict(enumerate(PROMPTS))

    def watch(canvas):
        for row, number in enumerate(canvas.number_B.tolist()):
            now = canvas.visible(row)
            assert all(token == MASK or now[i] == token for i, token in enumerate(known[number]))
            left = [i for i, token in enumerate(canvas.ids_BL[row].tolist()) if token == MASK]
            before = [i for i, token in enumerate(known[number]) if token == MASK]
            assert not before or len(set(before) - set(left)) > 0
            if pattern.block_size:
                assert all(i >= canvas.start_B[row] for i in left)
            known[number] = now

    how = plan(11, 0.2, cache, part_size=2 if isinstance(cache, SubBlock) else None)
    decoded = decode(make_denoiser(shift=shift, pattern=pattern), PROMPTS, how, watch=watch)
    for row, prompt in zip(decoded.rows, PROMPTS, strict=True):
        assert row.ids[: len(prompt)] == prompt and MASK not in row.ids and len(row.ids) == len(prompt) + 11


@by_pattern
def test_a_low_threshold_fills_each_block_in_one_forward(make_denoiser, pattern):
    denoiser = make_denoiser(pattern=pattern)
    decoded = decode(denoiser, [PROMPT], plan(10, 1e-6))
    assert decoded.forwards == (3 if pattern.block_size else 1)
    assert decoded.tokens_per_forward == 10 / decoded.forwards


def test_the_prompt_is_seen_inside_the_block_it_half_fills(make_denoiser):
    denoiser = make_denoiser(pattern=PATTERNS["clean"])
    first, second = (ids(denoiser, [[*PROMPT[:5], last]], plan(2))[0][6:] for last in (8, 200))
    assert first != second


@by_pattern
def test_the_mask_and_rows_without_a_token_are_never_emitted(make_denoiser, pattern):
    denoiser = make_denoiser(pattern=pattern)
    favourite = ids(denoiser, [PROMPT], plan(1))[0][-1]
    with torch.no_grad():  # the mask's logit is twice the favourite's; the favourite itself is no token any more
        head_VD = denoiser.network.get_output_embeddings().weight
        head_VD[MASK] = 2 * head_VD[favourite]
    banned = type(denoiser)(denoiser.network, MASK, set(range(300)) - {favourite}, pattern=pattern)
    for sampling in (Sampling(), Sampling(5.0)):
        assert not {favourite, MASK} & set(ids(banned, [PROMPT], plan(9, sampling=sampling))[0][6:])


def test_nothing_to_decode_is_the_prompt(make_denoiser):
    decoded = decode(make_denoiser(pattern=PATTERNS["clean"]), PROMPTS, plan(0, cache=Prefix()))
    assert [row.ids for row in decoded.rows] == PROMPTS
    assert (decoded.tokens, decoded.forwards, decoded.tokens_per_forward, decoded.cached_share) == (0, 0, 0, 0)


@pytest.mark.timeout(60)
def test_a_network_that_has_become_nan_does_not_hang(make_denoiser):
    denoiser = make_denoiser("qwen3", pattern=Pattern(4, "clean"))
    torch.nn.init.constant_(denoiser.network.model.norm.weight, float("nan"))
    assert len(ids(denoiser, [[5, 6]], plan(6, 0.9, Prefix()))[0]) == 8


# Batches


by_parts = pytest.mark.parametrize(
    "parts",
    [
        {"selector": Threshold(0.2)},
        {"selector": Threshold(0.1, at_most=2), "sampling": Sampling(0.8, top_p=0.9, seed=3)},
        {"selector": Schedule(2)},
        {"selector": LeftToRight(2)},
        {"selector": RandomOrder(2)},
        {"selector": RandomOrder(1), "cache": Greedy(2, 3)},
        {"selector": Threshold(0.2), "cache": Delayed(3)},
        {"selector": Threshold(0.2), "cache": SubBlock(), "part_size": 2},
    ],
    ids=str,
)


def suited(denoiser, parts) -> Plan:
    """A plan of these parts with the exact cache that a model allows; without blocks there are no parts of them."""
    if isinstance(parts.get("cache"), SubBlock) and not denoiser.pattern.block_size:
        parts = parts | {"cache": Delayed(2)}
    return plan(10, **({"cache": exact(denoiser)} | parts))


@by_pattern
@by_shift
@by_parts
def test_a_batch_is_its_rows_one_by_one(make_denoiser, pattern, shift, parts):
    denoiser = make_denoiser(shift=shift, pattern=pattern)
    how = suited(denoiser, parts)
    together = decode(denoiser, PROMPTS, how).rows
    for number, prompt in enumerate(PROMPTS):
        alone = decode(denoiser, [prompt], how, first=number).rows[0]
        assert together[number] == alone


def test_rows_that_end_leave_the_batch(make_denoiser):
    denoiser = make_denoiser(pattern=PATTERNS["clean"])
    sizes = []
    hook = denoiser.network.get_input_embeddings().register_forward_hook(lambda _, ids, __: sizes.append(len(ids[0])))
    alone = [decode(denoiser, [prompt], plan(9, 0.05, Prefix())).forwards for prompt in PROMPTS]
    sizes.clear()
    decoded = decode(denoiser, PROMPTS, plan(9, 0.05, Prefix()))
    hook.remove()
    assert [row.forwards for row in decoded.rows] == alone and len(set(alone)) > 1
    assert sizes == [sum(n > step for n in alone) for step in range(max(alone))]


# Shapes and backends


@by_pattern
@by_shift
@by_parts
def test_static_shapes_change_no_token(make_denoiser, pattern, shift, parts):
    denoiser = make_denoiser(shift=shift, pattern=pattern)
    how = suited(denoiser, parts)
    assert decode(denoiser, PROMPTS, how, static=True).rows == decode(denoiser, PROMPTS, how, static=False).rows


@by_shift
def test_with_static_shapes_a_forward_shows_whole_blocks_and_looks_at_all_slots(make_denoiser, shift):
    denoiser = make_denoiser(shift=shift, pattern=PATTERNS["clean"])
    seen = set()
    layer = denoiser.network.model.layers[0].self_attn

    def note(_, args, options):
        view, keys = options["attention_plan"].view, options["attention_plan"].keys
        seen.add((view.ids_BS.shape[1], keys.ids_BS.shape[1]))

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    for length in range(3, 12):
        decode(denoiser, [[7] * length], plan(30, 0.05, Prefix()), static=True)
    hook.remove()
    assert seen == {(4, 64), (8, 64), (12, 64)}  # a block, two of them, and the longest prompts' three


@pytest.mark.parametrize("parts", [{}, {"cache": SubBlock(), "part_size": 2}, {"cache": Delayed(3)}], ids=str)
def test_a_compiled_network_decodes_the_same_tokens(make_denoiser, parts):
    """By the tracer alone, which needs no C compiler; what is generated of the graphs is torch's own to test."""
    denoiser = make_denoiser(shift="none", pattern=PATTERNS["clean"])
    how = plan(10, 0.2, **({"cache": Prefix()} | parts))
    expected = [decode(denoiser, [prompt], how).rows for prompt in PROMPTS]
    torch._dynamo.reset()
    compiled(denoiser, backend="eager", fullgraph=True)
    assert [decode(denoiser, [prompt], how).rows for prompt in PROMPTS] == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def on_cache(q_NSHD, k_BKGD, v_BKGD, cache_seqlens, cache_batch_idx, softmax_scale, causal, softcap):
    """What flash-attn documents of `flash_attn_with_kvcache` without new keys, sequence by sequence."""
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32 and not causal and not softcap
    out = []
    for q_SHD, reach, row in zip(q_NSHD, cache_seqlens.tolist(), cache_batch_idx.tolist(), strict=True):
        share = q_SHD.shape[1] // k_BKGD.shape[2]
        k_KHD, v_KHD = (x[row, :reach].float().repeat_interleave(share, 1) for x in (k_BKGD, v_BKGD))
        weights_HSK = (softmax_scale * torch.einsum("shd,khd->hsk", q_SHD.float(), k_KHD)).softmax(2)
        out.append(torch.einsum("hsk,khd->shd", weights_HSK, v_KHD))
    return torch.stack(out)


@by_shift
@pytest.mark.parametrize("pattern", [PATTERNS["clean"], PATTERNS["noisy"]], ids=["clean", "noisy"])
def test_blocks_by_flash_attention_on_the_cache_decode_the_same_tokens(make_denoiser, monkeypatch, pattern, shift):
    """The kernel is emulated and keeps float32, so that a difference is one of what it is told to look at."""
    denoiser = make_denoiser(shift=shift, pattern=pattern)
    how = plan(10, 0.2, Prefix())
    expected = decode(denoiser, PROMPTS, how, static=True).rows
    plans = []

    def planned(*args):
        plans.append(made := flash.cached_plan(*args))
        return made

    monkeypatch.setattr(flash, "_applies", lambda *_: True)
    monkeypatch.setattr(flash, "HALF", torch.float32)
    monkeypatch.setattr(flash, "cached_kernel", lambda: on_cache)
    monkeypatch.setattr(attention, "flash", SimpleNamespace(plan=lambda *_: None, cached_plan=planned))
    assert decode(denoiser, PROMPTS, how, static=True).rows == expected
    assert plans and None not in plans
    for others in (plan(10, 0.2, SubBlock(), part_size=2), plan(10, 0.2, Delayed()), plan(10, 0.2)):
        plans.clear()
        decode(denoiser, PROMPTS, others, static=True)
        assert set(plans) <= {None}  # what they show is not whole blocks


# Bad input


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 2 of 2 is empty"),
        ([[MASK, 1]], "the prompt begins with the mask"),
        ([[1, 301]], "the prompt has token 301, and the vocabulary 301 tokens"),
        ([[1, -1]], "the prompt has token -1"),
        ([[1] * 250], "has 250 tokens and 9 are to come; the model has 256 positions"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(make_denoiser, prompts, message):
    with pytest.raises(ValueError, match=message):
        decode(make_denoiser(), prompts, plan())


def test_no_prompts_are_nothing_to_do(make_denoiser):
    assert decode(make_denoiser(), [], plan()).rows == []


def test_a_decoder_that_the_pattern_cannot_support_is_refused(make_denoiser):
    with pytest.raises(ValueError, match="block_size 16 lets tokens see later ones, which an AR source never did"):
        decode(make_denoiser(shift="next_token"), [PROMPT], plan(block_size=16))
    for name in ("clean", "noisy", "full"):
        with pytest.raises(ValueError, match="autoregressive decoder needs"):
            decode(make_denoiser(pattern=PATTERNS[name]), [PROMPT], plan(cache=Causal()))
    with pytest.raises(ValueError, match="part_size 3 does not divide the block size 4"):
        decode(make_denoiser(pattern=PATTERNS["clean"]), [PROMPT], plan(part_size=3))
