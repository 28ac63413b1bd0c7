"""Exact answers: synthetic prompts whose answers are known, for checks of what a model can still do."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dlm_lightning.data.answers import Answers
from dlm_lightning.data.token_data import Span, Split

OPENING, CLOSING = "([{<", ")]}>"
PAIRS = 8  # that a look-up chooses from
REPEATS = 10_000  # prompts drawn in vain, one after another, before there are said to be no more


def _letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def _copy(rng: random.Random, length: int) -> tuple[str, str]:
    letters = _letters(rng, length)
    return letters, letters


def _reverse(rng: random.Random, length: int) -> tuple[str, str]:
    letters = _letters(rng, length)
    return letters, letters[::-1]


def _sort(rng: random.Random, length: int) -> tuple[str, str]:
    letters = _letters(rng, length)
    return letters, "".join(sorted(letters))


def _add(rng: random.Random, length: int) -> tuple[str, str]:
    a, b = rng.randrange(10**length), rng.randrange(10**length)
    return f"{a:0{length}}+{b:0{length}}", f"{a + b:0{length}}"


def _close(rng: random.Random, length: int) -> tuple[str, str]:
    opened = "".join(rng.choices(OPENING, k=length))
    return opened, opened[::-1].translate(str.maketrans(OPENING, CLOSING))


def _look_up(rng: random.Random, length: int) -> tuple[str, str]:
    value_of = {key: rng.choice(string.digits) for key in rng.sample(string.ascii_lowercase, PAIRS)}
    keys = rng.choices(list(value_of), k=length)
    return "".join(map("".join, value_of.items())) + f" {''.join(keys)}", "".join(value_of[key] for key in keys)


TASKS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "add": _add,
    "close": _close,
    "look_up": _look_up,
}


class ExactAnswers(Answers):
    """Prompts such as `sort dacb =` with exact answers; the prompt is never masked nor scored.

    Args:
        tasks: which to mix in equal parts: `copy`, `reverse` and `sort` letters, `add` two numbers, `close` brackets,
            `look_up` letters among pairs of a letter and a digit.
        shortest, longest: characters of an answer, drawn evenly; a sum may have one more.
        samples: distinct training prompts; a tenth as many are kept for validation, and no prompt is in both.
        **options: see `Answers`.
    """

    def __init__(
        self,
        tasks: Sequence[str] = tuple(TASKS),
        shortest: int = 4,
        longest: int = 10,
        samples: int = 20_000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        unknown = set(tasks) - set(TASKS)
        if unknown or not tasks:
            raise ValueError(f"data.tasks: {', '.join(sorted(unknown)) or 'none'} given; there are {', '.join(TASKS)}")
        if not 1 <= shortest <= longest:
            raise ValueError(f"data.shortest must lie between 1 and data.longest ({longest}), not {shortest}")
        if samples < 10:
            raise ValueError(f"data.samples must be at least 10, not {samples}")
        self.tasks, self.shortest, self.longest, self.samples = list(tasks), shortest, longest, samples

    def texts(self, split: Split) -> Iterator[list[Span]]:
        """Distinct prompts with their answers, drawn by a generator of their own; each eleventh is for validation."""
        rng, seen, in_vain = random.Random(0), set[str](), 0
        while len(seen) < self.samples + self.samples // 10:
            task = rng.choice(self.tasks)
            question, answer = TASKS[task](rng, rng.randint(self.shortest, self.longest))
            prompt = f"{task} {question} ="
            if prompt in seen:
                in_vain += 1
                if in_vain == REPEATS:
                    raise ValueError(f"data.samples: hardly more than {len(seen)} distinct prompts can be asked")
                continue
            seen.add(prompt)
            in_vain = 0
            if (len(seen) % 11 == 0) == (split == "val"):
                yield [Span(prompt, maskable=False), Span(f" {answer}")]

    def identity(self) -> str:
        """The tasks, the lengths and the number of samples."""
        return f"exact answers {' '.join(self.tasks)} {self.shortest} {self.longest} {self.samples}"
