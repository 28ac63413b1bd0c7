"""A character-level tokenizer, a trainer that is only its facts, and a data module whose documents are given."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_lightning.data.token_data import Span, TokenData


class Facts(SimpleNamespace):
    """A stand-in for the trainer and the recipe; like the real ones, not to be pickled."""

    def __reduce_ex__(self, protocol):
        raise TypeError("a data module must not drag its trainer along")


class Given(TokenData):
    """The documents given, each a text or a (prompt, text); `reads` records each split that is read."""

    def __init__(self, train, val=("val",), name="given", **options):
        super().__init__(**options)
        self.documents, self.name, self.reads = {"train": train, "val": val}, name, []

    def texts(self, split) -> Iterator[list[Span]]:
        self.reads.append(split)
        for document in self.documents[split]:
            prompt, text = ("", document) if isinstance(document, str) else document
            yield [Span(prompt, maskable=False), Span(text)]

    def identity(self) -> str:
        return self.name


@pytest.fixture
def given(tmp_path):
    """Makes a `Given` that caches in the test's folder."""
    return lambda *args, **options: Given(*args, **{"cache_dir": str(tmp_path / "cache"), "row_length": 8, **options})


@pytest.fixture
def characters():
    """Makes a tokenizer with id 0 for end of text and 1, 2, … for the letters a, b, …"""

    def make(alphabet="abcdefghijklmnopqrstuvwxyz", eos_token="<eos>"):
        vocab = {letter: n for n, letter in enumerate(["<eos>", *alphabet, "<end>"])}
        words = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
        words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        words.add_special_tokens(["<eos>", "<end>"])
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos_token)

    return make


@pytest.fixture
def attach(characters):
    """Gives a data module a trainer whose model brings a tokenizer (None: it has no source)."""

    def attach(data, tokenizer="characters", mask_id=1000, **facts):
        tokenizer = characters() if tokenizer == "characters" else tokenizer
        recipe = Facts(mask_id=mask_id, tokenizer=tokenizer, source=tokenizer and "source")
        defaults = {"max_steps": 4, "global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
        strategy = Facts(root_device=torch.device("cpu"))
        data.trainer = Facts(lightning_module=recipe, strategy=strategy, **defaults | facts)
        return data

    return attach


@pytest.fixture
def ready(attach):
    """Attaches a trainer to a data module, prepares it and sets it up."""

    def ready(data, *args, **facts):
        attach(data, *args, **facts)
        data.prepare_data()
        data.setup("fit")
        return data

    return ready
