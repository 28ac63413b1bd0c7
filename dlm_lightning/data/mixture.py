"""A mixture: several data modules as one, in proportion to their sizes or to weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import datasets
import numpy as np

from dlm_lightning.data import report
from dlm_lightning.data.rows import Tally
from dlm_lightning.data.stream import MixedOrder
from dlm_lightning.data.token_data import Span, Split, TokenData, padded_sum


class Mixture(TokenData):
    """Several data modules as one; its own keys hold for all of them.

    Args:
        parts: the data modules; keys that all modules have, such as `row_length`, are given to the mixture alone.
        weights: how often each part is drawn, as positive numbers in proportion; null draws each row once per epoch.
        **options: see `TokenData`.
    """

    def __init__(self, parts: list[TokenData], weights: list[float] | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not parts:
            raise ValueError("data.parts must name at least one data module")
        if weights is not None and len(weights) != len(parts):
            raise ValueError(f"data.weights: there are {len(weights)} for the {len(parts)} of data.parts")
        if not all(0 < weight < math.inf for weight in weights or []):
            raise ValueError(f"data.weights must be above 0, not {weights}")
        defaults = TokenData()  # type: ignore[abstract]  # for its keys' values alone
        for number, part in enumerate(parts):
            if isinstance(part, Mixture):
                raise ValueError(f"data.parts.{number} is a mixture itself; name its parts in data.parts")
            for key in list(inspect.signature(TokenData.__init__).parameters)[1:]:
                if getattr(part, key) != getattr(defaults, key):
                    raise ValueError(f"data.parts.{number}.{key} is the mixture's to say; give data.{key}")
                setattr(part, key, getattr(self, key))
        self.parts, self.weights = parts, weights

    @cached_property
    def order(self) -> MixedOrder:
        """Which row of which part comes when; refuses weights under which a part would never come."""
        rows = [len(part.rows["train"]) for part in self.parts]
        order = MixedOrder(rows, self.weights, self.seed)
        if 0 in order.draws:
            raise ValueError(
                f"data.weights: of the {order.rows} draws of an epoch none falls to data.parts.{order.draws.index(0)}"
            )
        return order

    def report(self) -> list[str]:
        """The mixture's own lines, and after the first one for each part."""
        of_parts = [
            f"  part {number}, {type(part).__name__}: "
            f"{report.size(part.tallies['train'], len(part.rows['train']), self.row_length)}; "
            f"{draws:,} draws per epoch ({draws / self.order.rows:.1%})"
            for number, (part, draws) in enumerate(zip(self.parts, self.order.draws, strict=True))
        ]
        first, *rest = super().report()
        return [first, *of_parts, *rest]

    def facts(self) -> dict[str, Any]:
        """Those of all modules, and the weights."""
        return {**super().facts(), "data.weights": self.weights}

    def texts(self, split: Split) -> Iterator[Sequence[Span]]:
        """The documents of all parts, one part after another."""
        return chain.from_iterable(part.texts(split) for part in self.parts)

    def identity(self) -> str:
        """Those of the parts."""
        return "\n".join(f"{type(part).__qualname__} {part.identity()}" for part in self.parts)

    @property
    def ending(self) -> str:
        """Those of the parts."""
        return "\n".join(part.ending for part in self.parts)

    def pin(self, init_args: Any) -> None:
        """Its own, and those of its parts."""
        super().pin(init_args)
        for part, config in zip(self.parts, init_args["parts"], strict=True):
            part.pin(config["init_args"])

    def _packed(self, split: Split) -> datasets.Dataset:
        self._find_tokenizer()
        for number, part in enumerate(self.parts):
            part.trainer, part.tokenizer = self.trainer, self.tokenizer
            try:
                part.rows[split] = part._packed(split)
            except (OSError, ValueError) as error:  # which speaks of `data`, as if the part were alone
                raise ValueError(f"data.parts.{number}: {error}") from error
        self.tallies[split] = sum((part.tallies[split] for part in self.parts), Tally())
        return datasets.concatenate_datasets([part.rows[split] for part in self.parts])

    def _count_tokens(self) -> np.ndarray:
        """Of an epoch of the mixture: a part's tokens as often as its rows are drawn, so not always whole."""
        counts = np.zeros(0)
        for part, draws in zip(self.parts, self.order.draws, strict=True):
            counts = padded_sum(counts, part._count_tokens() * (draws / len(part.rows["train"])))
        return counts
