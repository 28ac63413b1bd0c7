"""Chats: conversations rendered by a chat template, of which the assistant's answers are masked and scored."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from dlm_lightning.data import conversations
from dlm_lightning.data.answers import Answers
from dlm_lightning.data.conversations import SHAPES, Message
from dlm_lightning.data.files import File, absolute, train_and_val, versions
from dlm_lightning.data.hub import load
from dlm_lightning.data.records import Malformed, check_share, for_validation, placed, read
from dlm_lightning.data.token_data import Span, Split

log = logging.getLogger(__name__)
SUFFIXES = (".jsonl", ".parquet")  # of a folder's files
SHOWN = 5  # reasons that a report of malformed records gives


class Chat(Answers):
    """Conversations whose prompts are shown and whose answers are masked and scored.

    A record holds `messages` (role and content), ShareGPT's `conversations` (from and value), or a prompt and its
    response. What follows a conversation's last answer is left out. Answers are counted with the tokens that end
    their turn; one that opens a conversation answers nothing and is shown like a prompt.

    Args:
        paths: JSONL or parquet files, folders, globs, or fsspec URLs of them.
        hub: instead of `paths`, a data set of the Hugging Face hub, or a local folder that `datasets` reads.
        hub_name: the hub set's configuration.
        hub_split: the hub set's split.
        prompt_key: where a record of two texts keeps the prompt.
        response_key: where it keeps the answer.
        val_paths: files kept for validation, also if they are among `paths`.
        val_share: without `val_paths`, the share of the conversations, evenly spread, that is kept for validation.
        chat_template: a chat template as text, or a .jinja file; null takes the tokenizer's own.
        turns: whether `all` answers of a conversation are scored, or the `last`.
        skip_malformed: leave out what is no conversation or what the template refuses, with a report; otherwise the
            report is an error.
        **options: see `Answers`.
    """

    def __init__(
        self,
        paths: list[str] | None = None,
        hub: str | None = None,
        hub_name: str | None = None,
        hub_split: str = "train",
        prompt_key: str = "prompt",
        response_key: str = "response",
        val_paths: list[str] | None = None,
        val_share: float = 0.05,
        chat_template: str | None = None,
        turns: Literal["all", "last"] = "all",
        skip_malformed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if bool(paths) == bool(hub):
            raise ValueError("give one of data.paths (files) and data.hub (a data set of the hub)")
        check_share(val_share)
        self.paths, self.hub, self.hub_name, self.hub_split = paths, hub, hub_name, hub_split
        self.prompt_key, self.response_key = prompt_key, response_key
        self.val_paths, self.val_share = val_paths, val_share
        self.chat_template, self.turns = chat_template, turns
        self.skip_malformed = skip_malformed

    # What is read

    def texts(self, split: Split) -> Iterator[list[Span]]:
        """The conversations of a split in the order of their files; all malformed records are told of at the end."""
        malformed: dict[str, list[str]] = {}  # places by reason
        count = 0
        for place, record in self._records(split):
            try:
                spans = self._spans(conversations.messages(record, self.prompt_key, self.response_key))
            except Malformed as error:
                malformed.setdefault(str(error), []).append(place)
                continue
            kept = for_validation(count, self.val_share, phase=1 - self.val_share)  # the first, however few there are
            if self.val_paths or kept == (split == "val"):
                yield spans
            count += 1
        if malformed:
            report = _report(malformed, count)
            if not count:
                raise ValueError(report)
            if not self.skip_malformed:
                raise ValueError(f"{report}; data.skip_malformed=true leaves them out")
            if self.val_paths or split == "train":  # otherwise both splits are read from the same files
                log.info("%s; they are left out", report)

    def identity(self) -> str:
        """What the files or the hub set hold, and how they are read, rendered and split."""
        rendered = [self._template, self.turns]
        hub = [self._hub_set._fingerprint] if self.hub else []
        records = [*hub, *versions(*self._files), self.prompt_key, self.response_key, self.skip_malformed]
        split = "apart" if self.val_paths else self.val_share
        return "\n".join(map(str, ["chat", *rendered, *records, split]))

    def pin(self, init_args: Any) -> None:
        """Those of all modules, and a hub set or a template where it is a local folder or file."""
        super().pin(init_args)
        for key in ("hub", "chat_template"):
            if (value := init_args.get(key)) and os.path.exists(os.path.expanduser(value)):
                init_args[key] = absolute(value)

    def facts(self) -> dict[str, int | str]:
        """What must stay as it is when a run is continued."""
        return {"data.turns": self.turns, **super().facts()}

    @cached_property
    def _files(self) -> tuple[list[File], list[File]]:
        return train_and_val(self.paths or [], self.val_paths, SUFFIXES)

    @cached_property
    def _hub_set(self) -> Any:
        return load("data.hub", self.hub or "", self.hub_name, self.hub_split)

    def _records(self, split: Split) -> Iterator[tuple[str, Any]]:
        apart = split == "val" and bool(self.val_paths)
        if self.hub and not apart:
            yield from placed(self.hub, self._hub_set)
        train, val = self._files
        for file in val if apart else train:
            yield from read(file, [*SHAPES, self.prompt_key, self.response_key])

    # What is shown and what is scored

    @cached_property
    def _template(self) -> str:
        """The chat template as text; a ValueError says what is missing."""
        if self.tokenizer is None:
            raise ValueError("data: chats need model.source, whose tokenizer has the chat template's tokens")
        text = conversations.template(self.chat_template)
        if not text and not self.tokenizer.chat_template:
            raise ValueError("data.chat_template must be set: the source's tokenizer has no chat template")
        return self.tokenizer.get_chat_template(text)

    def _render(self, messages: list[Message], asks: bool = False) -> str:
        """The conversation as text, with the header of an answer that is asked for; Malformed if it is refused."""
        template = self._template
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=asks
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"data.chat_template: line {error.lineno}: {error.message}") from error
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise Malformed(f"is refused by the chat template: {error}") from error

    def _spans(self, messages: list[Message]) -> list[Span]:
        """Prompts and answers in turn, ending with the last answer; together they are the conversation as rendered.

        A prompt is what is rendered when its answer is asked for, so that tokenised alone it is what decoding sees.
        """
        answers = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
        if not answers:
            raise Malformed("has no answer: no turn of the assistant after another turn")
        whole = self._render(messages[: answers[-1] + 1])
        spans: list[Span] = []
        done = 0
        for n in answers if self.turns == "all" else answers[-1:]:
            prompt = self._render(messages[:n], asks=True)
            answered = whole if n == answers[-1] else self._render(messages[: n + 1])
            if not whole.startswith(answered) or not answered.startswith(prompt) or len(prompt) < done:
                raise ValueError(self._why_not(messages[: answers[-1]], whole))
            if not _holds(answered[len(prompt) :], messages[n]["content"]):
                raise ValueError(
                    "data.chat_template must be a template as text or a .jinja file that renders what is answered; "
                    f"{reprlib.repr(self._template)} leaves out an answer's text"
                )
            stop = max(len(prompt), self._end(answered))
            spans += [Span(whole[done : len(prompt)], maskable=False), Span(whole[len(prompt) : stop])]
            done = stop
        return spans

    def _end(self, answered: str) -> int:
        """Where an answer ends: white space that a template writes after the token that ends a turn is not its own."""
        bare = answered.rstrip()
        return len(bare if bare.endswith(self._added) else answered)

    @cached_property
    def _added(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values())

    def _why_not(self, before_last: list[Message], whole: str) -> str:
        if self.turns == "all" and whole.startswith(self._render(before_last, asks=True)):
            return "the chat template rewrites earlier turns, so only the last answer can be scored: data.turns=last"
        return "the chat template renders an answer otherwise than it asks for it; data.chat_template can be another"


def _holds(rendered: str, answer: str) -> bool:
    """Whether an answer's text is there, whatever a template does to its white space and to a thought before it."""
    return "".join(answer.rpartition("</think>")[2].split()) in "".join(rendered.split())


def _report(malformed: dict[str, list[str]], others: int) -> str:
    """How many records are malformed, and by the first few reasons where the first one is and how many more are."""
    count = sum(map(len, malformed.values()))
    shown = [
        f"{first} {reason}" + f" (and {len(more):,} more)" * bool(more)
        for reason, (first, *more) in islice(malformed.items(), SHOWN)
    ]
    cut = ["…"] * (len(malformed) > SHOWN)
    return f"data: {count} of {count + others} records are malformed: {'; '.join([*shown, *cut])}"
