"""The drawn pattern is the pattern."""

from __future__ import annotations

import pytest

from dlm_lightning.picture import BLOCK, LENGTH, MASK_ID, characters, example, labels
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.view import attention_mask


def block(position: int) -> int:
    return position // BLOCK


# (recipe, noisy copies, whether there is a clean one, who sees whom: copies from 1 are noisy, 0 is clean)
BLOCKS = {
    "same noisy block": lambda q, k, i, j: q == k > 0 and block(i) == block(j),
    "earlier clean blocks": lambda q, k, i, j: q > 0 == k and block(j) < block(i),
    "clean sees clean": lambda q, k, i, j: q == k == 0 and block(j) <= block(i),
}
CAUSAL = BLOCKS | {"clean sees clean": lambda q, k, i, j: q == k == 0 and j <= i}
PATTERNS = {
    "ar_source": (ArSource, {}, 0, True, {"causal": lambda q, k, i, j: j <= i}),
    "full_bidirectional": (FullBidirectional, {}, 1, False, {"all": lambda q, k, i, j: True}),
    "block_causal": (BlockCausal, {"block_size": BLOCK}, 1, True, BLOCKS),
    "causal context": (BlockCausal, {"block_size": BLOCK, "context_rank": "causal", "ar_weight": 1.0}, 1, True, CAUSAL),
    "noisy context": (
        BlockCausal,
        {"block_size": BLOCK, "context": "noisy"},
        1,
        False,
        {"earlier and own blocks": lambda q, k, i, j: block(j) <= block(i)},
    ),
    "complementary_mask": (ComplementaryMask, {"block_size": BLOCK}, 2, True, BLOCKS),
    "full_bidirectional with an AR loss": (
        FullBidirectional,
        {"ar_weight": 1.0},
        1,
        True,
        {
            "noisy": lambda q, k, i, j: q == k > 0,
            "clean": lambda q, k, i, j: q == k == 0 and j <= i,
        },
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_characters_are_the_published_pattern(name):
    recipe_class, options, noisy, clean, rules = PATTERNS[name]
    view = example(recipe_class(source="nowhere", **options))
    head, blank, *lines = characters(view, attention_mask(view)[0]).split("\n")
    assert "attend" in head and not blank
    tokens = [(copy, i) for copy in [*range(1, noisy + 1), *([0] if clean else [])] for i in range(LENGTH)]
    assert len(lines) == len(tokens)
    for line, (q, i) in zip(lines, tokens, strict=True):
        drawn = line.partition("│")[2].removesuffix("│")
        cells = [drawn[n : n + 2] for n in range(0, len(drawn), 2)]
        seen = [any(rule(q, k, i, j) for rule in rules.values()) for k, j in tokens]
        assert [cell != "  " for cell in cells] == seen, line
        own_copy = {"▓▓" if view.copy_BS[0, n] else "██" for n, sees in enumerate(seen) if sees}
        assert {cell for cell in cells if cell != "  "} == own_copy


def test_labels_name_position_copy_and_mask():
    view = example(ComplementaryMask(source="nowhere", block_size=BLOCK))
    names = labels(view)
    assert names[0] == "0'" and names[LENGTH] == "0''" and names[2 * LENGTH :] == [str(i) for i in range(LENGTH)]
    for i in range(1, LENGTH):  # complementary: masked in one copy and shown in the other
        assert {names[i], names[LENGTH + i].replace("''", "'")} == {f"{i}'", f"{i}'·"}
    assert [name.endswith("·") for name in names] == (view.ids_BS[0] == MASK_ID).tolist()


@pytest.mark.parametrize("recipe", ["full_bidirectional", "block_causal", "complementary_mask", "ar_source"])
def test_show_draws_a_png_and_prints_its_path_last(recipe, typed, tmp_path):
    """No source is there: a picture needs none."""
    said = typed("show", recipe, cwd=tmp_path)
    picture = tmp_path / f"{recipe}.png"
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == f"picture: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "██" in said.out


def test_show_takes_overrides_and_a_place(typed, tmp_path):
    said = typed("show", "block_causal", "model.block_size=3", "--out", "deep/mine.png", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert (tmp_path / "deep" / "mine.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    first = next(line for line in said.out.splitlines() if line.lstrip().startswith("0'"))
    assert first.partition("│")[2].startswith("▓" * 6 + " ")
