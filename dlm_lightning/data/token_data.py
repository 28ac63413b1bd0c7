"""What all data modules share: documents are tokenised and packed once, then streamed with their noise."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import datasets
import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from dlm_lightning import interruption
from dlm_lightning.data import report
from dlm_lightning.data.files import absolute
from dlm_lightning.data.rows import Document, Row, Tally, beginning, pack
from dlm_lightning.data.stream import (
    TRAIN,
    VALIDATION,
    MixedOrder,
    NoisyRows,
    Order,
    Sample,
    TrainStream,
    ValidationStream,
    collate,
)
from dlm_lightning.data.tokenizer import trained_tokenizer

LARGEST = 2**24  # tokens of a vocabulary: many times what any model has

log = logging.getLogger(__name__)
Split = Literal["train", "val"]
FEATURES = datasets.Features(
    {
        name: datasets.List(datasets.Value(kind))
        for name, kind in [("ids", "int32"), ("position", "int32"), ("document", "int32"), ("maskable", "bool")]
    }
)
datasets.disable_progress_bars()


class Span(NamedTuple):
    """A piece of a document's text that is tokenised by itself, and whether it may be masked and scored."""

    text: str
    maskable: bool = True


class TokenData(L.LightningDataModule):
    """Packed rows of tokens. A data module of one's own implements `texts` and `identity`.

    Args:
        row_length: tokens per row.
        batch_size: rows per device and micro-batch.
        val_rows: rows of the validation split to use, evenly spread, over all ranks; null uses all.
        vocab_size: train a byte-level BPE of this size on the training split; only for a model without a source.
        pack: whether documents share rows; false gives each rows of its own, padded.
        seed: decides the order of the samples and their noise, and nothing else.
        num_workers: processes that load batches.
        cache_dir: where tokenised rows and trained tokenizers are kept; `$XDG_CACHE_HOME/dlm_lightning` by default.
    """

    splits_documents: ClassVar[bool] = True
    trainer: Any  # there whenever Lightning calls; its own annotation says optional

    def __init__(
        self,
        row_length: int = 256,
        batch_size: int = 16,
        val_rows: int | None = 64,
        vocab_size: int | None = None,
        pack: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        least = [("row_length", row_length, 2), ("batch_size", batch_size, 1)]  # one token has nothing to mask
        for name, value, minimum in [*least, ("val_rows", val_rows, 1), ("num_workers", num_workers, 0)]:
            if value is not None and value < minimum:
                raise ValueError(f"data.{name} must be at least {minimum}, not {value}")
        if vocab_size is not None and not 1 <= vocab_size <= LARGEST:
            raise ValueError(f"data.vocab_size must be between 1 and {LARGEST:,}, not {vocab_size}")
        self.row_length, self.batch_size, self.val_rows = row_length, batch_size, val_rows
        self.vocab_size, self.pack, self.seed, self.num_workers = vocab_size, pack, seed, num_workers
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cache / "dlm_lightning"
        self.tokenizer: Any = None
        self.rows: dict[Split, datasets.Dataset] = {}
        self.tallies: dict[Split, Tally] = {}
        self.counts_V = np.empty(0, int)

    @abstractmethod
    def texts(self, split: Split) -> Iterator[Sequence[Span]]:
        """The documents of a split in a fixed order, each as its spans; a prompt is a span that is not maskable."""

    @abstractmethod
    def identity(self) -> str:
        """A text that changes when the documents change; names the cache."""

    def prepare_data(self) -> None:
        """Tokenise and pack both splits into the cache, on one process per node."""
        for split in ("train", "val"):
            self._packed(split)

    def setup(self, stage: str) -> None:
        """Open the packed rows, refuse a mask token that occurs in them, and before training say what they are."""
        if not self.rows:
            self._open()
        if stage == "fit" and self.trainer.global_rank == 0:
            log.info("\n".join(self.report()))

    def report(self) -> list[str]:
        """What the run trains on, in a few lines."""
        first = report.marked(self.rows["train"][self.order.draw(0).index], self.tokenizer)
        train, val = self.tallies["train"], self.tallies["val"]
        return [
            f"data: {report.size(train, len(self.rows['train']), self.row_length)}; "
            f"{report.vocabulary(self.counts_V, len(self.tokenizer))}",
            f"  {report.lengths(train, self.positions)}",
            f"  validation: {report.size(val, len(self.rows['val']), self.row_length)}; "
            f"{val.tokens / (train.tokens + val.tokens):.1%} of all tokens",
            f"  first sample, what may be masked in {report.OPEN} {report.CLOSE}: {first}",
        ]

    def pin(self, init_args: Any) -> None:
        """Make local paths absolute in what a run's config keeps of this module, to be read from any folder."""
        for key in ("paths", "val_paths"):
            if init_args.get(key):
                init_args[key] = [absolute(path) for path in init_args[key]]
        if init_args.get("cache_dir"):
            init_args["cache_dir"] = absolute(init_args["cache_dir"])

    @cached_property
    def order(self) -> Order | MixedOrder:
        """Which row comes when."""
        return Order(len(self.rows["train"]), self.seed)

    @property
    def positions(self) -> int:
        """How many positions the model has by its config; without end if that says nothing of them."""
        return getattr(self.trainer.lightning_module.model_config, "max_position_embeddings", None) or sys.maxsize

    def unigram_entropy(self) -> float:
        """Entropy of the training tokens' frequencies, in nats: the loss of a model that knows nothing else."""
        p = self.counts_V[self.counts_V > 0] / self.counts_V.sum()
        return float(-(p * np.log(p)).sum())

    def prompts(self, count: int) -> list[list[int]]:
        """Token ids that begin up to `count` validation rows, evenly spread: what precedes an answer, or a few tokens.

        They are at most half as long as a row, or as the model has positions.
        """
        rows, longest = self.rows["val"], min(self.row_length, self.positions) // 2
        return [beginning(Row(**rows[n * len(rows) // count]), longest) for n in range(min(count, len(rows)))]

    def facts(self) -> dict[str, int | str]:
        """What must stay as it is when a run is continued."""
        return {
            "data": self._fingerprint,
            "data.seed": self.seed,
            "global batch size": self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches,
        }

    def train_dataloader(self) -> DataLoader:
        """The run's micro-batches for this rank, from the step at which the trainer stands."""
        return self._loader("train", self._stream(), TRAIN)

    def samples_of(self, step: int) -> list[Sample]:
        """What the optimizer step of this number, from 1, is made of, on all ranks."""
        trainer, stream = self.trainer, self._stream()
        per_step = trainer.accumulate_grad_batches
        return [
            Sample(micro_batch, rank, *draw)
            for micro_batch in range(per_step)
            for rank in range(trainer.world_size)
            for draw in stream.draws((step - 1) * per_step + micro_batch, rank)
        ]

    def _stream(self) -> TrainStream:
        trainer = self.trainer
        per_step = trainer.accumulate_grad_batches
        return TrainStream(
            self.order,
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            start=trainer.global_step * per_step,
            stop=trainer.max_steps * per_step,
        )

    def val_dataloader(self) -> DataLoader:
        """The validation rows for this rank, with noise that is the same at each validation."""
        rows = len(self.rows["val"])
        take = min(self.val_rows or rows, rows)
        stream = ValidationStream(rows, take, self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return self._loader("val", stream, VALIDATION)

    def _loader(self, split: Split, stream: TrainStream | ValidationStream, noise: int) -> DataLoader:
        rows = NoisyRows(self.rows[split], self.row_length, self.tokenizer.eos_token_id, self.seed, noise)
        return DataLoader(
            rows,
            batch_sampler=stream,
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=interruption.ignore,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )

    def _open(self) -> None:
        if self.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps must be set: the run's length decides its schedule and its stream")
        if self.trainer.accumulate_grad_batches < 1:
            raise ValueError("trainer.accumulate_grad_batches must be at least 1")
        if (block_size := self.trainer.lightning_module.pattern.block_size or 1) > self.row_length:
            raise ValueError(f"data.row_length must be at least model.block_size, {block_size}, not {self.row_length}")
        self.rows = {split: self._packed(split) for split in ("train", "val")}
        self.counts_V = self._count_tokens()
        mask_id = self.trainer.lightning_module.mask_id
        if mask_id < len(self.counts_V) and self.counts_V[mask_id]:
            times = np.ceil(self.counts_V[mask_id])
            raise ValueError(f"model.mask_token: id {mask_id} occurs {times:,.0f} times in the data; choose another")

    def _packed(self, split: Split) -> datasets.Dataset:
        self._find_tokenizer()
        try:
            rows = datasets.Dataset.from_generator(
                self._rows,
                gen_kwargs={"split": split},
                features=FEATURES,
                cache_dir=str(self.cache_dir / "rows"),
                fingerprint=f"{self._fingerprint}-{split}",  # given, so that nothing is pickled to be hashed
            )
        except datasets.exceptions.DatasetGenerationError as error:  # says no more than that there was one
            raise error.__cause__ or error from None
        if not self._tally_file(split).exists():
            deque(self._rows(split), maxlen=0)  # reads the documents again, for the tally alone
        self.tallies[split] = Tally.read(self._tally_file(split))
        return rows.with_format("numpy")

    def _find_tokenizer(self) -> None:
        if self.tokenizer is not None:
            return
        recipe = self.trainer.lightning_module
        if recipe.source and self.vocab_size is not None:
            raise ValueError("data.vocab_size must be null: the source brings its own tokenizer")
        self.tokenizer = recipe.tokenizer if recipe.source else self.trained_tokenizer()
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the source's tokenizer has no end-of-text token, which separates packed documents")

    def _rows(self, split: Split) -> Iterator[dict[str, np.ndarray]]:
        tally, pad_id = Tally(), self.tokenizer.eos_token_id
        documents = self._documents(split)
        how = self.splits_documents, self.pack, self.positions
        for row in pack(documents, self.row_length, pad_id, *how, tally):
            yield row._asdict()
        if not tally.tokens:
            why = f": all {tally.dropped} have nothing to mask in a row of data.row_length {self.row_length}"
            raise ValueError(f"data: the {split} split is empty; it needs more documents{why if tally.dropped else ''}")
        tally.write(self._tally_file(split))

    def _tally_file(self, split: Split) -> Path:
        return self.cache_dir / "rows" / f"{self._fingerprint}-{split}.json"

    def _documents(self, split: Split) -> Iterator[Document]:
        for spans in self.texts(split):
            ids: list[int] = []
            maskable: list[bool] = []
            for span in spans:
                ids += self.tokenizer(span.text, add_special_tokens=False)["input_ids"]
                maskable += [span.maskable] * (len(ids) - len(maskable))
            yield self.close(ids, maskable)

    def close(self, ids: list[int], maskable: list[bool]) -> Document:
        """A document's tokens with what ends it: an end-of-text token, to be learned like any other."""
        return Document([*ids, self.tokenizer.eos_token_id], [*maskable, True])

    @property
    def ending(self) -> str:
        """A text that changes when documents are closed otherwise; names the rows, as `identity` does."""
        return ""

    def trained_tokenizer(self) -> Any:
        """The tokenizer of a model without a source, trained on the training split once and kept in the cache."""
        if self.vocab_size is None:
            raise ValueError("the model has no source to bring a tokenizer, so data.vocab_size must be set")
        folder = self.cache_dir / "tokenizers" / _digest(self.identity(), str(self.vocab_size))
        return trained_tokenizer(
            lambda: ("".join(span.text for span in spans) for spans in self.texts("train")), self.vocab_size, folder
        )

    @cached_property
    def _fingerprint(self) -> str:
        """Names what the rows are made of; taken once, as files may change and a call may set a tokenizer's padding."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.eos_token_id)
        how = self.row_length, self.splits_documents, self.pack, self.positions
        return _digest(self.identity(), self.ending, *tokenizer, *map(str, how))

    def _count_tokens(self) -> np.ndarray:
        table = self.rows["train"].data
        counts = np.zeros(len(self.tokenizer), int)
        for ids, document in zip(table.column("ids").chunks, table.column("document").chunks, strict=True):
            real = ids.flatten().to_numpy()[document.flatten().to_numpy() >= 0]
            counts = padded_sum(counts, np.bincount(real))
        return counts


def padded_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two vectors of counts; the shorter one has none of what it lacks."""
    length = max(len(a), len(b))
    return np.pad(a, (0, length - len(a))) + np.pad(b, (0, length - len(b)))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
