"""Synthetic prompts: right answers, and no prompt in both splits."""

from collections import Counter

import pytest

from dlm_lightning.data.exact_answers import TASKS, ExactAnswers


def right(prompt):
    """The answer to a prompt, worked out by hand's rules rather than by the module's."""
    task, *question, equals = prompt.split(" ")
    assert equals == "="
    if task == "look_up":
        pairs, keys = question
        return "".join(pairs[pairs.index(key) + 1] for key in keys)
    [question] = question
    if task == "add":
        a, b = question.split("+")
        assert len(a) == len(b)
        return f"{int(a) + int(b)}".rjust(len(a), "0")
    if task == "sort":
        return "".join(letter * question.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    if task == "close":
        opened, answer = list(question), ""
        while opened:
            answer += {"(": ")", "[": "]", "{": "}", "<": ">"}[opened.pop()]
        return answer
    if task == "reverse":
        return "".join(question[-1 - n] for n in range(len(question)))
    assert task == "copy"
    return question


@pytest.fixture(scope="module")
def pairs():
    return {split: list(ExactAnswers(samples=2000).texts(split)) for split in ("train", "val")}


def test_every_answer_is_right(pairs):
    for prompt, answer in pairs["train"] + pairs["val"]:
        assert answer.text == " " + right(prompt.text) and answer.maskable and not prompt.maskable


def test_prompts_are_distinct_and_in_one_split(pairs):
    prompts = [prompt.text for split in pairs.values() for prompt, _ in split]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("samples", [10, 19, 109, 110, 2000])
def test_there_are_as_many_samples_as_asked_for_and_a_tenth_for_validation(samples):
    data = ExactAnswers(samples=samples)
    assert len(list(data.texts("train"))) == samples
    assert len(list(data.texts("val"))) == samples // 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_tasks_are_mixed_in_equal_parts(pairs, split):
    counts = Counter(prompt.text.split()[0] for prompt, _ in pairs[split])
    share = len(pairs[split]) / len(TASKS)
    assert set(counts) == set(TASKS)
    assert all(abs(count - share) < 4 * share**0.5 for count in counts.values())


def test_only_the_tasks_asked_for_are_there():
    tasks = {prompt.text.split()[0] for prompt, _ in ExactAnswers(tasks=["sort", "add"], samples=100).texts("train")}
    assert tasks == {"sort", "add"}


def test_samples_are_the_same_each_time_whatever_the_seed(pairs):
    """The seed decides order and noise only; which documents there are must not move."""
    assert list(ExactAnswers(samples=2000, seed=5).texts("train")) == pairs["train"]


def test_identity_names_tasks_and_samples():
    options = [{}, {"tasks": ["add"]}, {"tasks": ["add", "copy"]}, {"samples": 30}, {"shortest": 5}, {"longest": 9}]
    assert len({ExactAnswers(**option).identity() for option in options}) == len(options)
    assert ExactAnswers(seed=1).identity() == ExactAnswers(seed=2).identity()


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (4, 10), (16, 24), (64, 64)])
def test_answers_have_all_lengths_asked_for_and_no_other(shortest, longest):
    options = {"tasks": ["copy", "reverse", "sort", "close", "look_up", "add"], "samples": 2000}
    if longest == 1:
        options = {"tasks": ["add"], "samples": 80}  # 100 sums of two digits
    lengths = Counter()
    for prompt, answer in ExactAnswers(shortest=shortest, longest=longest, **options).texts("train"):
        carried = prompt.text.startswith("add") and len(answer.text) - 1 > (len(prompt.text) - len("add + =")) // 2
        lengths[len(answer.text) - 1 - carried] += 1
    assert set(lengths) == set(range(shortest, longest + 1))


def test_a_multiple_that_blocks_do_not_divide_is_refused(ready, tmp_path):
    data = ExactAnswers(samples=50, vocab_size=300, row_length=75, multiple=5, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"^data.multiple must be a multiple of model.block_size, 4, not 5$"):
        ready(data, tokenizer=None)


def test_more_prompts_than_there_are_end_with_a_sentence():
    data = ExactAnswers(tasks=["close"], shortest=1, longest=2, samples=100)
    with pytest.raises(ValueError, match=r"^data.samples: hardly more than 20 distinct prompts can be asked$"):
        list(data.texts("train"))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"samples": 9}, "data.samples must be at least 10, not 9"),
        ({"multiple": 0}, "data.multiple must be at least 1 or null, not 0"),
        ({"shortest": 0}, r"data.shortest must lie between 1 and data.longest \(10\), not 0"),
        ({"shortest": 5, "longest": 4}, r"data.shortest must lie between 1 and data.longest \(4\), not 5"),
    ],
)
def test_numbers_without_a_meaning_are_refused(option, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        ExactAnswers(**option)


@pytest.mark.parametrize(("tasks", "named"), [(["add", "divide"], "divide"), ([], "none")])
def test_unknown_and_missing_tasks_are_refused_by_name(tasks, named):
    with pytest.raises(
        ValueError, match=f"data.tasks: {named} given; there are copy, reverse, sort, add, close, look_up"
    ):
        ExactAnswers(tasks=tasks)


def test_in_the_rows_exactly_the_answers_are_maskable_and_no_document_is_split(ready, tmp_path):
    data = ExactAnswers(samples=50, vocab_size=300, row_length=40, tail="none", cache_dir=str(tmp_path))
    ready(data, tokenizer=None)
    decoded = []
    for row in data.rows["train"]:
        for document in range(row["document"].max() + 1):
            here = row["document"] == document
            shown = data.tokenizer.decode(row["ids"][here & ~row["maskable"]])
            scored = data.tokenizer.decode(row["ids"][here & row["maskable"]])
            decoded.append((shown, scored))
    assert decoded == [(prompt.text, f"{answer.text}<|endoftext|>") for prompt, answer in data.texts("train")]


@pytest.mark.parametrize("multiple", [None, 32])
def test_the_last_block_is_filled_unless_the_row_ends_before(ready, tmp_path, multiple):
    data = ExactAnswers(samples=50, vocab_size=300, row_length=75, multiple=multiple, cache_dir=str(tmp_path))
    block_size = multiple or ready(data, tokenizer=None).trainer.lightning_module.pattern.block_size
    ready(data, tokenizer=None)
    fills = Counter()
    for row in data.rows["train"]:
        for document in range(row["document"].max() + 1):
            length = int((row["document"] == document).sum())
            assert length % block_size == 0 or row["document"][-1] == document
            fills[length % block_size == 0] += 1
    assert block_size > 1 and fills[True]
