"""Synthetic prompts: right answers, and no prompt in both splits."""

from collections import Counter

import pytest

from dlm_lightning.data.short_answers import MOST_SAMPLES, TASKS, ShortAnswers


def right(prompt):
    """The answer to a prompt, worked out by hand's rules rather than by the module's."""
    task, question, equals = prompt.split(" ")
    assert equals == "="
    if task == "add":
        a, b = question.split("+")
        return f"{int(a) + int(b)}"
    if task == "sort":
        return "".join(letter * question.count(letter) for letter in "abcdefghij")
    if task == "reverse":
        return "".join(question[-1 - n] for n in range(len(question)))
    assert task == "copy"
    return question


@pytest.fixture(scope="module")
def pairs():
    return {split: list(ShortAnswers(samples=2000).texts(split)) for split in ("train", "val")}


def test_every_answer_is_right(pairs):
    for prompt, answer in pairs["train"] + pairs["val"]:
        assert answer.text == " " + right(prompt.text) and answer.maskable and not prompt.maskable


def test_prompts_are_distinct_and_in_one_split(pairs):
    prompts = [prompt.text for split in pairs.values() for prompt, _ in split]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("samples", [10, 19, 109, 110, 2000])
def test_there_are_as_many_samples_as_asked_for_and_a_tenth_for_validation(samples):
    data = ShortAnswers(samples=samples)
    assert len(list(data.texts("train"))) == samples
    assert len(list(data.texts("val"))) == samples // 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_tasks_are_mixed_in_equal_parts(pairs, split):
    counts = Counter(prompt.text.split()[0] for prompt, _ in pairs[split])
    share = len(pairs[split]) / len(TASKS)
    assert set(counts) == set(TASKS)
    assert all(abs(count - share) < 4 * share**0.5 for count in counts.values())


def test_only_the_tasks_asked_for_are_there():
    tasks = {prompt.text.split()[0] for prompt, _ in ShortAnswers(tasks=["sort", "add"], samples=100).texts("train")}
    assert tasks == {"sort", "add"}


def test_samples_are_the_same_each_time_whatever_the_seed(pairs):
    """The seed decides order and noise only; which documents there are must not move."""
    assert list(ShortAnswers(samples=2000, seed=5).texts("train")) == pairs["train"]


def test_identity_names_tasks_and_samples():
    options = [{}, {"tasks": ["add"]}, {"tasks": ["add", "copy"]}, {"samples": 30}]
    assert len({ShortAnswers(**option).identity() for option in options}) == 4
    assert ShortAnswers(seed=1).identity() == ShortAnswers(seed=2).identity()


@pytest.mark.parametrize("samples", [9, MOST_SAMPLES + 1])
def test_too_few_and_too_many_samples_are_refused(samples):
    with pytest.raises(ValueError, match=f"data.samples must lie between 10 and {MOST_SAMPLES}, not {samples}"):
        ShortAnswers(samples=samples)


def test_the_scarcest_task_has_enough_prompts_for_the_most_samples():
    """`add` asks one of 1000 × 1000 sums; drawing stays quick as long as a good part of them is left."""
    assert MOST_SAMPLES * 1.1 < 0.6 * 1000 * 1000


@pytest.mark.parametrize(("tasks", "named"), [(["add", "divide"], "divide"), ([], "none")])
def test_unknown_and_missing_tasks_are_refused_by_name(tasks, named):
    with pytest.raises(ValueError, match=f"data.tasks: {named} given; there are copy, reverse, sort, add"):
        ShortAnswers(tasks=tasks)


def test_in_the_rows_exactly_the_answers_are_maskable_and_no_document_is_split(ready, tmp_path):
    data = ShortAnswers(samples=50, vocab_size=300, row_length=40, cache_dir=str(tmp_path))
    ready(data, tokenizer=None)
    decoded = []
    for row in data.rows["train"]:
        for document in range(row["document"].max() + 1):
            here = row["document"] == document
            shown = data.tokenizer.decode(row["ids"][here & ~row["maskable"]])
            scored = data.tokenizer.decode(row["ids"][here & row["maskable"]])
            decoded.append((shown, scored))
    assert decoded == [(prompt.text, f"{answer.text}<|endoftext|>") for prompt, answer in data.texts("train")]
