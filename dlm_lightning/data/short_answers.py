"""Short answers: synthetic prompts whose exact answers are known, for checks of what a model can still do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dlm_lightning.data.token_data import Span, Split, TokenData


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghij", k=rng.randint(4, 10)))


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(1000), rng.randrange(1000)
    return f"{a}+{b}", str(a + b)


def _on_letters(answer: Callable[[str], str]) -> Callable[[random.Random], tuple[str, str]]:
    def sample(rng: random.Random) -> tuple[str, str]:
        letters = _letters(rng)
        return letters, answer(letters)

    return sample


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _on_letters(lambda s: s),
    "reverse": _on_letters(lambda s: s[::-1]),
    "sort": _on_letters(lambda s: "".join(sorted(s))),
    "add": _sum,
}

MOST_SAMPLES = 500_000  # half of what the task with the fewest prompts, `add`, can ask


class ShortAnswers(TokenData):
    """Prompts such as `sort dacb =` with exact answers; the prompt is never masked nor scored.

    Args:
        tasks: which of `copy`, `reverse`, `sort` and `add` to mix in equal parts.
        samples: distinct training prompts; a tenth as many are kept for validation, and no prompt is in both.
        **options: see `TokenData`.
    """

    splits_documents = False

    def __init__(self, tasks: Sequence[str] = tuple(TASKS), samples: int = 20_000, **options: Any) -> None:
        super().__init__(**options)
        unknown = set(tasks) - set(TASKS)
        if unknown or not tasks:
            raise ValueError(f"data.tasks: {', '.join(sorted(unknown)) or 'none'} given; there are {', '.join(TASKS)}")
        if not 10 <= samples <= MOST_SAMPLES:
            raise ValueError(f"data.samples must lie between 10 and {MOST_SAMPLES}, not {samples}")
        self.tasks, self.samples = list(tasks), samples

    def texts(self, split: Split) -> Iterator[list[Span]]:
        """Distinct prompts with their answers, drawn by a generator of their own; each eleventh is for validation."""
        rng, seen = random.Random(0), set[str]()
        while len(seen) < self.samples + self.samples // 10:
            task = rng.choice(self.tasks)
            question, answer = TASKS[task](rng)
            prompt = f"{task} {question} ="
            if prompt not in seen:
                seen.add(prompt)
                if (len(seen) % 11 == 0) == (split == "val"):
                    yield [Span(prompt, maskable=False), Span(f" {answer}")]

    def identity(self) -> str:
        """The tasks and the number of samples."""
        return f"short answers {' '.join(self.tasks)} {self.samples}"
