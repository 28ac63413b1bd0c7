"""What is a conversation, and what is said of a record that is none."""

import json

import pytest

from dlm_lightning.data.conversations import messages
from dlm_lightning.data.records import Malformed

ASKED = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]


def read(record):
    return messages(record, "prompt", "response")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": ASKED, "prompt": "of another", "conversations": None},
        {"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}], "id": 7},
        {"conversations": ASKED},
        {"prompt": "how?", "response": "so"},
    ],
)
def test_every_shape_is_the_same_messages(record):
    assert read(record) == read(json.dumps(record).encode()) == ASKED


def test_the_keys_of_a_prompt_and_its_response_are_free():
    assert messages({"question": "how?", "answer": "so"}, "question", "answer") == ASKED


def test_other_roles_and_what_else_a_message_says_are_kept():
    turns = [{"role": "critic", "content": "", "name": "Ada"}, {"role": "assistant", "content": "so", "thinking": "hm"}]
    assert read({"messages": turns}) == turns
    assert read({"conversations": [{"from": "observation", "value": "3"}]}) == [{"role": "observation", "content": "3"}]


@pytest.mark.parametrize(
    "text", ["", "נִקּוּד عربي", "👩‍👩‍👧‍👦 🏳️‍🌈", "a\u2028b\x85c\r\n\td", "```py\nprint()\n```", "x" * 1_000_000]
)
def test_odd_texts_are_texts(text):
    turns = [{"role": "user", "content": text}, {"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    for ascii_only in (True, False):
        assert read(json.dumps({"messages": turns}, ensure_ascii=ascii_only).encode()) == turns


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{'messages': []}", "is not JSON: Expecting property name"),
        (b'{"messages": [', "is not JSON: Expecting value"),
        (b'\xff{"messages": []}', "is not JSON: .* can't decode byte"),
        (b"[" * 100_000, "is not JSON: maximum recursion"),
        (b"[1, 2]", "is a list, not an object"),
        (b"3", "is a number, not an object"),
        ({}, "has neither messages nor conversations nor prompt and response .*; it has nothing$"),
        ({"prompt": "how?"}, "has neither messages nor .*; it has prompt$"),
        ({"text": "all of it", "messages": None}, r"\(data.prompt_key and data.response_key\); it has text$"),
        ({"messages": "hello"}, "has messages that are text, not a list"),
        ({"messages": []}, "has messages that are empty"),
        ({"conversations": []}, "has conversations that are empty"),
        ({"messages": ["hello"]}, "has a message 1 without role and content"),
        ({"messages": [*ASKED, {"role": "user"}]}, "has a message 3 without role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "has a message 1 whose content is null, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "whose content is a list, not text"),
        ({"messages": [{"role": "user", "content": 3.5}]}, "whose content is a number, not text"),
        ({"messages": [{"role": True, "content": ""}]}, "has a message 1 whose role is a truth value, not text"),
        ({"conversations": [{"from": "gpt"}]}, "has a message 1 whose content is null, not text"),
        ({"prompt": {"a": 1}, "response": "so"}, "has a message 1 whose content is an object, not text"),
        (b'{"prompt": "\\ud83d", "response": ""}', "has a message 1 whose content is not Unicode: surrogates"),
    ],
)
def test_what_is_no_conversation_says_why(record, reason):
    with pytest.raises(Malformed, match=f"^{reason}|{reason}"):
        read(record)
