"""Tasks whose answers are known: the generated ones that a run trains on, and lines of Python from files held out.

What Python is worth counts beside the source alone: whether function and completed line parse, and whether the line's
identifiers are the file's.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterable, Iterator
from textwrap import dedent
from typing import NamedTuple

from dlm_lightning.data.exact_answers import TASKS, ExactAnswers
from dlm_lightning.data.mixture import Mixture
from dlm_lightning.data.text_files import TextFiles
from dlm_lightning.data.token_data import TokenData

PYTHON = "python"
NAMES = (*TASKS, PYTHON)
SHOWN, ASKED = 200, 40  # characters of a function before the line's end, and of the line's end, at most
IDENTIFIER = re.compile(r"[^\W\d]\w*")


class Question(NamedTuple):
    """A prompt and its answer; of Python, also the function before the line, to be parsed with it."""

    prompt: str
    answer: str
    before: str = ""

    def mark(self, text: str) -> dict[str, bool]:
        """What a continuation is worth: `exact`, or of Python `exact`, `parses` and `identifiers`."""
        if not self.before:
            return {"exact": text == self.answer}
        line = text.split("\n")[0]
        return {
            "exact": line.rstrip() == self.answer,
            "parses": parses(self.before + line),
            "identifiers": identifiers(line) == identifiers(self.answer),
        }


def questions(data: TokenData, names: list[str] | None, count: int) -> dict[str, list[Question]]:
    """Up to `count` held-out questions per task, by a title such as `sort 4-10`.

    Without names, of all tasks that the run trains on; a named task that it does not train on is asked with the
    module's own lengths. ValueError for a name that is no task.
    """
    check_names(names or ())
    parts = data.parts if isinstance(data, Mixture) else [data]
    exact = [part for part in parts if isinstance(part, ExactAnswers)]
    texts = [part for part in parts if isinstance(part, TextFiles) and part.paths is None]
    wanted = names or [*(task for part in exact for task in part.tasks), *([PYTHON] if texts else [])]
    found: dict[str, list[Question]] = {}
    if foreign := [task for task in wanted if task in TASKS and not any(task in part.tasks for part in exact)]:
        exact = [*exact, ExactAnswers(tasks=foreign)]
    for part in exact:
        own = {task: f"{task} {part.shortest}-{part.longest}" for task in part.tasks if task in wanted}
        found |= {title: [] for title in own.values()}
        left = dict.fromkeys(own, count)
        for prompt, answer in part.texts("val"):
            task = prompt.text.split()[0]
            if left.get(task):
                left[task] -= 1
                found[own[task]].append(Question(prompt.text, answer.text))
            if not any(left.values()):
                break
    if PYTHON in wanted:
        lines = list(python_lines(texts[0] if texts else TextFiles()))
        found[PYTHON] = [lines[n * len(lines) // count] for n in range(min(count, len(lines)))]
    return found


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is no task."""
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"there is no task {unknown[0]}; there are {', '.join(NAMES)}")


def python_lines(data: TextFiles) -> Iterator[Question]:
    """The ends of single-line statements in functions of held-out files, after `= `, `return ` or a call's `(`.

    The prompt is the function up to there, at most SHOWN characters of it.
    """
    for [span] in data.texts("val"):
        try:
            tree, lines = ast.parse(span.text), span.text.splitlines(keepends=True)
        except (SyntaxError, ValueError):  # of a template, or another Python's
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _of_function(function, lines)


def _of_function(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Iterator[Question]:
    for statement in function.body:
        if not isinstance(statement, ast.Assign | ast.Return | ast.Expr) or statement.lineno != statement.end_lineno:
            continue
        line = lines[statement.lineno - 1].rstrip("\n")
        cut = re.match(r"\s*(return |[^=#\"']+ = |[\w.]+\()", line)
        if not cut or "#" in line:
            continue
        before = "".join(lines[function.lineno - 1 : statement.lineno - 1]) + line[: cut.end()]
        answer = line[cut.end() :]
        if answer and len(answer) <= ASKED and identifiers(answer) and parses(before + answer):
            yield Question(before[-SHOWN:], answer, before)


def parses(source: str) -> bool:
    """Whether a source is Python once its common indentation is taken away."""
    try:
        ast.parse(dedent(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def identifiers(line: str) -> list[str]:
    """The names in a line, in order, keywords left out."""
    return [name for name in IDENTIFIER.findall(line) if not keyword.iskeyword(name)]
