"""Block-wise decoding against transformers' own generate and a decoder written with loops and a plain network."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning.decode.blockwise import decode
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, sees

MASK = 300
PROMPT = [17, 250, 3, 99, 41, 8]
PATTERNS = {
    "clean": Pattern(4, "clean"),
    "clean, causal rank": Pattern(4, "clean", "causal"),
    "noisy": Pattern(4, "noisy"),
    "full": Pattern(None),
}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
by_shift = pytest.mark.parametrize("shift", ["none", "next_token"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("pattern", [AUTOREGRESSIVE, Pattern(1, "clean")], ids=["one copy", "clean context"])
def test_block_size_1_with_shift_is_greedy_generation(make_denoiser, source_folder, family, tied, pattern):
    network = AutoModelForCausalLM.from_pretrained(source_folder(family, tied))
    prompt = torch.tensor([PROMPT])
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    expected = network.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()
    denoiser = make_denoiser(family, tied, shift="next_token")
    decoded = decode(denoiser, PROMPT, pattern, new_tokens=12, threshold=1.0, eos_id=None)
    assert decoded.ids == expected
    assert decoded.new_ids == expected[len(PROMPT) :] and len(set(decoded.new_ids)) > 2
    assert len(decoded.canvases) == 12 and decoded.tokens_per_forward == 1


def by_loops(plain_logits, denoiser, pattern, new_tokens: int, threshold: float) -> list[int]:
    """Blocks on the document's positions, filled from the surest token on, with a mask from the definition."""
    ids, total, block = list(PROMPT), len(PROMPT) + new_tokens, pattern.block_size or len(PROMPT) + new_tokens
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
            for i in (i for i, token in enumerate(ids) if token == MASK):
                p, token = logits[i - (denoiser.shift == "next_token")].softmax(0).max(0)
                guesses[i] = (p.item(), token.item())
            surest = max(guesses, key=lambda i: guesses[i][0])
            for i, (p, token) in guesses.items():
                if i == surest or p > threshold:
                    ids[i] = token
    return ids


@by_pattern
@by_shift
@pytest.mark.parametrize("threshold", [1.0, 0.2])
@pytest.mark.parametrize("new_tokens", [1, 9])
def test_decoding_equals_a_decoder_written_with_loops(
    make_denoiser, plain_logits, pattern, shift, threshold, new_tokens
):
    denoiser = make_denoiser(shift=shift)
    decoded = decode(denoiser, PROMPT, pattern, new_tokens, threshold, eos_id=None)
    assert decoded.ids == by_loops(plain_logits, denoiser, pattern, new_tokens, threshold)
    assert len(decoded.ids) == len(PROMPT) + new_tokens
    if threshold == 1:
        assert len(decoded.canvases) == new_tokens


@pytest.mark.parametrize("first_token", ["clean", "noisy"])
def test_training_on_the_noisy_predecessor_does_not_change_decoding(make_denoiser, plain_logits, first_token):
    denoiser = make_denoiser(shift="next_token", first_token=first_token)
    pattern = PATTERNS["clean"]
    decoded = decode(denoiser, PROMPT, pattern, 7, 1.0, eos_id=None)
    assert decoded.ids == by_loops(plain_logits, denoiser, pattern, 7, 1.0)


def forwards(denoiser, *args, cached: bool, **options):
    """What was decoded, and of each forward the tokens that passed the network and the logits."""
    widths, logits = [], []
    hooks = [
        denoiser.network.get_input_embeddings().register_forward_hook(
            lambda _, ids, __: widths.append(ids[0].shape[1])
        ),
        denoiser.register_forward_hook(lambda _, __, out: logits.append(out[:, :300])),
    ]
    decoded = decode(denoiser, *args, eos_id=None, cached=cached, **options)
    for hook in hooks:
        hook.remove()
    return decoded, widths, logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shift, first_token", [("none", "clean"), ("next_token", "clean"), ("next_token", "noisy")])
@pytest.mark.parametrize("context_rank", ["block", "causal"])
def test_cached_decoding_equals_uncached(make_denoiser, family, tied, shift, first_token, context_rank):
    denoiser = make_denoiser(family, tied, shift=shift, first_token=first_token)
    pattern = Pattern(4, "clean", context_rank)
    for prompt in (
        PROMPT[:2],
        PROMPT[:4],
        PROMPT,
        PROMPT * 2,
    ):  # in the first block, all of it, beyond it, three blocks
        decoded, _, logits = forwards(denoiser, prompt, pattern, 9, 0.2, cached=True)
        expected, _, expected_logits = forwards(denoiser, prompt, pattern, 9, 0.2, cached=False)
        assert decoded.ids == expected.ids and decoded.canvases == expected.canvases
        for cached_NV, plain_NV in zip(logits, expected_logits, strict=True):
            assert (cached_NV - plain_NV).abs().max() <= 1e-5 * plain_NV.abs().max()


def test_a_finished_block_passes_the_network_once(make_denoiser):
    denoiser = make_denoiser()
    decoded, widths, _ = forwards(denoiser, PROMPT, PATTERNS["clean"], 7, 1.0, cached=True)
    assert widths == [8, 4, 8, 4, 4, 4, 5] and decoded.tokens_per_forward == 1
    assert forwards(denoiser, PROMPT, PATTERNS["clean"], 7, 1.0, cached=False)[1] == [8, 8, 12, 12, 12, 12, 13]


@pytest.mark.parametrize("pattern", [PATTERNS["noisy"], PATTERNS["full"], AUTOREGRESSIVE], ids=["noisy", "full", "ar"])
def test_without_a_clean_context_nothing_is_cached(make_denoiser, pattern):
    denoiser = make_denoiser(shift="next_token")
    cached, plain = (forwards(denoiser, PROMPT, pattern, 7, 1.0, cached=cached) for cached in (True, False))
    assert cached[:2] == plain[:2]


def test_masks_in_a_prompt_are_filled_without_a_cache(make_denoiser):
    prompt = [PROMPT[0], MASK, *PROMPT[2:]]
    cached, plain = (forwards(make_denoiser(), prompt, PATTERNS["clean"], 7, 1.0, cached=c) for c in (True, False))
    assert cached[:2] == plain[:2] and MASK not in cached[0].ids


def test_under_a_predicate_of_its_own_a_recipe_decodes_without_a_cache(make_denoiser):
    denoiser = make_denoiser(predicate=lambda q, k: sees(q, k) | (q.copy_BS == 0))  # context that sees what comes later
    cached, plain = (forwards(denoiser, PROMPT, PATTERNS["clean"], 7, 1.0, cached=cached) for cached in (True, False))
    assert cached[:2] == plain[:2]


@by_pattern
@by_shift
def test_committed_tokens_stay_and_blocks_come_in_order(make_denoiser, pattern, shift):
    decoded = decode(make_denoiser(shift=shift), PROMPT, pattern, 11, 0.2, eos_id=None)
    known = list(PROMPT)
    for canvas in decoded.canvases:
        assert all(token == MASK or canvas[i] == token for i, token in enumerate(known))
        assert canvas.count(MASK) < len(canvas) - sum(token != MASK for token in known)
        if pattern.block_size:
            assert MASK not in canvas[: (len(canvas) - 1) // pattern.block_size * pattern.block_size]
        known = canvas
    assert known == decoded.ids and MASK not in known


@by_pattern
def test_a_low_threshold_fills_each_block_in_one_forward(make_denoiser, pattern):
    decoded = decode(make_denoiser(), PROMPT, pattern, 10, 1e-6, eos_id=None)
    assert [len(canvas) for canvas in decoded.canvases] == ([8, 12, 16] if pattern.block_size else [16])
    assert decoded.tokens_per_forward == 10 / len(decoded.canvases)


def test_the_prompt_is_seen_inside_the_block_it_half_fills(make_denoiser):
    denoiser = make_denoiser()
    first, second = (
        decode(denoiser, [*PROMPT[:5], last], PATTERNS["clean"], 2, 1.0, eos_id=None).new_ids for last in (8, 200)
    )
    assert first != second


@by_pattern
def test_the_mask_and_rows_without_a_token_are_never_emitted(make_denoiser, pattern):
    favourite = decode(make_denoiser(), PROMPT, pattern, 1, 1.0, eos_id=None).new_ids[0]
    denoiser = make_denoiser()
    with torch.no_grad():  # the mask's logit is twice the favourite's; the favourite itself is no token any more
        head_VD = denoiser.network.get_output_embeddings().weight
        head_VD[MASK] = 2 * head_VD[favourite]
    banned = type(denoiser)(denoiser.network, MASK, set(range(300)) - {favourite})
    decoded = decode(banned, PROMPT, pattern, 1, 1.0, eos_id=None)
    assert decoded.new_ids[0] not in (favourite, MASK)


@by_pattern
def test_eos_ends_the_sequence(make_denoiser, pattern):
    denoiser = make_denoiser(shift="next_token")
    free = decode(denoiser, PROMPT, pattern, 12, 1.0, eos_id=None)
    eos = free.new_ids[3]
    stopped = decode(denoiser, PROMPT, pattern, 12, 1.0, eos_id=eos)
    end = len(PROMPT) + free.new_ids.index(eos) + 1
    assert stopped.ids == free.ids[:end] and stopped.prompt_tokens == len(PROMPT)
    if pattern.block_size:
        assert len(stopped.canvases) < len(free.canvases)
    assert decode(denoiser, [*PROMPT[:2], eos, *PROMPT[3:]], pattern, 3, 1.0, eos_id=eos).ids[2] == eos


def test_nothing_to_decode_is_the_prompt(make_denoiser):
    decoded = decode(make_denoiser(), PROMPT, PATTERNS["clean"], 0, 1.0, eos_id=None)
    assert decoded.ids == PROMPT and decoded.new_ids == [] and decoded.tokens_per_forward == 0


def test_an_empty_prompt_and_a_threshold_out_of_range_are_refused(make_denoiser):
    denoiser = make_denoiser()
    with pytest.raises(ValueError, match="prompt is empty"):
        decode(denoiser, [], AUTOREGRESSIVE, 3, 1.0, eos_id=None)
    for threshold in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            decode(denoiser, PROMPT, AUTOREGRESSIVE, 3, threshold, eos_id=None)


@pytest.mark.timeout(60)
def test_a_network_that_has_become_nan_does_not_hang(make_denoiser):
    denoiser = make_denoiser("qwen3")
    torch.nn.init.constant_(denoiser.network.model.norm.weight, float("nan"))
    decoded = decode(denoiser, [5, 6], Pattern(4, "clean"), 6, threshold=0.9, eos_id=None)
    assert len(decoded.new_ids) == 6
