"""A character-level tokenizer, a trainer that is only its facts, and a data module whose documents are given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlm_lightning.data.chat import Chat
from dlm_lightning.data.token_data import Span, TokenData
from dlm_lightning.view import Pattern


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

    def attach(data, tokenizer="characters", mask_id=1000, positions=None, **facts):
        tokenizer = characters() if tokenizer == "characters" else tokenizer
        config = Facts(max_position_embeddings=positions)
        recipe = Facts(mask_id=mask_id, tokenizer=tokenizer, source=tokenizer and "source", model_config=config)
        recipe.pattern = Pattern(4)
        defaults = {"max_steps": 4, "global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
        strategy = Facts(root_device=torch.device("cpu"))
        data.trainer = Facts(lightning_module=recipe, strategy=strategy, **defaults | facts)
        return data

    return attach


CHAT_TEMPLATES = {  # files in templates/, in the manner of five families, with their end-of-text token
    "chatml": "<|im_end|>",
    "headers": "<|eot_id|>",
    "inst": "</s>",
    "model_turns": "<eos>",
    "thinking": "<|endoftext|>",
}
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT_TOKENS += ["<start_of_turn>", "<end_of_turn>", "<eos>"]


@pytest.fixture
def make_chat(tiny_tokenizer, tmp_path, attach, monkeypatch):
    """`make_chat(records, family, block_size=4, …)`: a Chat over a file of records, for a model with blocks."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")

    def make(records=None, family="chatml", block_size=4, mask_id=900, **options):
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
        tokenizer.eos_token, tokenizer.bos_token = CHAT_TEMPLATES[family], "<s>"
        if records is not None:
            lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
            (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            options["paths"] = [str(tmp_path / "chats.jsonl")]
        template = Path(__file__).parent / "templates" / f"{family}.jinja"
        defaults = {"row_length": 64, "cache_dir": str(tmp_path / "cache"), "val_share": 0.01}
        data = Chat(**{"chat_template": str(template)} | defaults | options)
        attach(data, tokenizer, mask_id=mask_id)
        data.trainer.lightning_module.pattern = Pattern(block_size)
        data.tokenizer = tokenizer  # as `prepare_data` leaves it
        return data

    return make


@pytest.fixture
def ready(attach):
    """Attaches a trainer to a data module, prepares it and sets it up."""

    def ready(data, *args, **facts):
        attach(data, *args, **facts)
        data.prepare_data()
        data.setup("fit")
        return data

    return ready
