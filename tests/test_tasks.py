"""Tasks: questions are held out and their answers right; Python is judged by what parses and what is named."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from dlm_lightning.data.exact_answers import ExactAnswers
from dlm_lightning.data.mixture import Mixture
from dlm_lightning.data.text_files import TextFiles
from dlm_lightning.tasks import Question, identifiers, python_lines, questions


@pytest.fixture
def mixture() -> Mixture:
    short = ExactAnswers(tasks=["copy", "sort"], shortest=4, longest=6, samples=500)
    return Mixture([short, ExactAnswers(tasks=["copy"], shortest=20, longest=30, samples=300), TextFiles()])


def test_all_tasks_of_a_mixture_are_asked_with_their_lengths(mixture):
    found = questions(mixture, None, 7)
    assert list(found) == ["copy 4-6", "sort 4-6", "copy 20-30", "python"]
    assert all(len(its) == 7 for its in found.values())
    assert all(4 <= len(q.answer.strip()) <= 6 for q in found["sort 4-6"])
    assert all(20 <= len(q.answer.strip()) <= 30 for q in found["copy 20-30"])


def test_questions_are_held_out_and_their_answers_right(mixture):
    found = questions(mixture, ["sort"], 40)
    trained = {prompt.text for part in mixture.parts[:2] for prompt, _ in part.texts("train")}
    for question in found["sort 4-6"]:
        assert question.prompt not in trained
        assert question.answer == " " + "".join(sorted(question.prompt.split()[1]))
        assert question.mark(question.answer) == {"exact": True}
        assert question.mark(question.answer + "x") == {"exact": False}


def test_a_task_that_a_run_does_not_train_on_is_asked_with_the_modules_lengths(mixture):
    assert list(questions(mixture, ["reverse"], 3)) == ["reverse 4-10"]
    assert list(questions(TextFiles(), ["add"], 3)) == ["add 4-10"]
    assert list(questions(TextFiles(["some"]), None, 3)) == []


def test_lines_of_python_are_ends_of_statements_in_held_out_files():
    data = TextFiles()
    held_out = "".join(span.text for [span] in data.texts("val"))
    lines = list(python_lines(data))
    assert len(lines) > 200
    for question in lines[::20]:
        assert question.before.endswith(question.prompt) and question.before + question.answer in held_out
        ast.parse(dedent(question.before + question.answer))
        assert question.mark(question.answer + "\nmore") == {"exact": True, "parses": True, "identifiers": True}


@pytest.mark.parametrize(
    "text, exact, parses, named",
    [
        ("self.total(x)", True, True, True),
        ("self.total( x )", False, True, True),
        ("self.total(x", False, False, True),
        ("self.sum(x)", False, True, False),
        ("", False, False, False),
    ],
)
def test_a_line_is_judged_by_what_it_says(text, exact, parses, named):
    before = "    def f(self, x):\n        y = "
    found = Question(before, "self.total(x)", before).mark(text)
    assert found == {"exact": exact, "parses": parses, "identifiers": named}


def test_identifiers_are_names_without_keywords():
    assert identifiers("x if not self._y else [z1 for z1 in größe]") == ["x", "self", "_y", "z1", "z1", "größe"]


def test_a_task_that_is_not_there_is_refused(mixture):
    with pytest.raises(ValueError, match="there is no task dance; there are copy"):
        questions(mixture, ["copy", "dance"], 3)
