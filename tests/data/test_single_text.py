"""A corpus of one text: its end is kept for validation."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlm_lightning.data.text_files import TextFiles


def texts(data, split):
    return [span.text for [span] in data.texts(split)]


@pytest.fixture
def single(tmp_path):
    """`single("a\\nb", val_share=0.5)`: (what is trained on, what is validated on) of a file of this text."""

    def split(text, **options):
        (tmp_path / "book.txt").write_text(text)
        data = TextFiles([str(tmp_path / "book.txt")], **options)
        return [texts(data, split) for split in ("train", "val")]

    return split


@given(st.text("ab\n ", max_size=40), st.floats(0.01, 0.99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_single_text_is_split_at_the_line_break_before_its_share_or_the_first(single, text, share):
    """Against all places where it could be split: a line begins there, and neither side is blank."""
    places = [n for n in range(1, len(text)) if text[n - 1] == "\n" and text[:n].strip() and text[n:].strip()]
    if not places:
        with pytest.raises(
            ValueError, match=r"^data.paths: .*book.txt has fewer than two lines .*; data.val_paths can"
        ):
            single(text, val_share=share)
        return
    [train], [val] = single(text, val_share=share)
    wanted = [n for n in places if n <= round(len(text) * (1 - share))]
    assert train + val == text and len(train) == (max(wanted) if wanted else min(places))


def test_the_end_of_a_single_text_is_validated_on_by_its_share(single):
    lines = [f"line {n:03}\n" for n in range(400)]
    assert single("".join(lines)) == [["".join(lines[:380])], ["".join(lines[380:])]]
    assert single("a\nb", val_share=0.001) == single("a\nb", val_share=0.999) == [["a\n"], ["b"]]


def test_a_single_text_beside_records_is_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}')
    data = TextFiles([str(tmp_path)], val_share=0.5)
    assert [sorted(texts(data, split)) for split in ("train", "val")] in (
        [["four", "one\ntwo"], ["three"]],
        [["one\ntwo", "three"], ["four"]],
    )


def test_a_run_reports_how_much_of_the_text_it_validates_on(ready, tmp_path):
    (tmp_path / "book.txt").write_text("abcdefghi\n" * 10)
    data = TextFiles([str(tmp_path / "book.txt")], val_share=0.2, row_length=8, cache_dir=str(tmp_path / "cache"))
    ready(data)
    assert [data.tallies[split].tokens for split in ("train", "val")] == [80 + 1, 20 + 1]
    assert data.report()[2].endswith(f"; {21 / 102:.1%} of all tokens")
