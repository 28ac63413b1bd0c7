"""A byte-level BPE trained on the corpus, for models that start without a tokenizer of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def trained_tokenizer(texts: Callable[[], Iterable[str]], vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, trained there first on `texts()` if the folder does not exist yet."""
    if not folder.is_dir():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size <= len(alphabet):
            raise ValueError(f"data.vocab_size must be above {len(alphabet)} (bytes and end of text), not {vocab_size}")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts(), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(dir=folder.parent)
        tokenizer.save_pretrained(beside)
        try:
            os.rename(beside, folder)  # all or nothing, also when two runs train it at once
        except OSError:
            shutil.rmtree(beside)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
