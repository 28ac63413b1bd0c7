"""What a record's conversation is: a list of messages, in any of the shapes that files and the hub have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlm_lightning.data.records import Malformed, kind, mapping, text

SHAPES = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; others are what they say
Message = dict[str, Any]


def messages(record: Any, prompt_key: str, response_key: str) -> list[Message]:
    """The messages of a record: `messages`, ShareGPT's `conversations`, or else a prompt and its response.

    Each is a dict with at least `role` and `content`. Raises Malformed for everything else.
    """
    record = mapping(record)
    key = next((key for key in SHAPES if record.get(key) is not None), None)
    if key is None:
        pair = [record.get(prompt_key), record.get(response_key)]
        if None in pair:
            have = ", ".join(key for key, value in record.items() if value is not None) or "nothing"
            raise Malformed(
                f"has neither messages nor conversations nor {prompt_key} and {response_key} "
                f"(data.prompt_key and data.response_key); it has {have}"
            )
        turns: Any = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    else:
        turns = record[key]
    if not isinstance(turns, list):
        raise Malformed(f"has {key} that are {kind(turns)}, not a list")
    if not turns:
        raise Malformed(f"has {key} that are empty")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> Message:
    if isinstance(turn, dict) and "role" not in turn and "from" in turn:
        turn = {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise Malformed(f"has a message {number} without role and content")
    for key in ("role", "content"):
        text(turn[key], f"has a message {number} whose {key}")
    return turn


def template(given: str | None) -> str | None:
    """A chat template as text, from its text or a .jinja file."""
    if not given or not given.endswith(".jinja"):
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"data.chat_template: there is no file {given}")
    return file.read_text(encoding="utf-8")
