"""Which text of a conversation is shown and which is scored, and how it ends."""

import numpy as np
import pytest

FAMILIES = {  # by template: the header and the end of an answer
    "chatml": ("<|im_start|>assistant\n", "<|im_end|>"),
    "headers": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "inst": ("", "</s>"),
    "model_turns": ("<start_of_turn>model\n", "<end_of_turn>"),
}


def said(*texts, first="user"):
    """A conversation whose turns alternate."""
    roles = [first, "user" if first == "assistant" else "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


SYSTEM = {"role": "system", "content": "be brief"}
CHATS = [
    said("how?", "so"),
    said("how?", "so", "and then? 🙂", "like that:\n```py\nprint()\n```", "שלום", "سلام"),
    said("", "", " ", "\n\n"),
    said("long " * 300, "longer " * 500, "more", "end"),
]


def pieces(data, split="val"):
    return [[tuple(span) for span in spans] for spans in data.texts(split)]


def documents(data, split="val"):
    return [(list(ids), list(maskable)) for ids, maskable in data._documents(split)]


# What is shown and what is scored


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_answers_are_scored_with_the_end_of_their_turn_and_nothing_else(make_chat, family, turns, chat):
    data = make_chat([chat], family, turns=turns)
    [spans] = pieces(data)
    header, end = FAMILIES[family]
    trimmed = family in ("headers", "model_turns")
    answers = [m["content"].strip() if trimmed else m["content"] for m in chat["messages"] if m["role"] == "assistant"]
    assert [text for text, maskable in spans if maskable] == [a + end for a in answers][-1 if turns == "last" else 0 :]
    assert all(text.endswith(header) for text, maskable in spans if not maskable)
    whole = data.tokenizer.apply_chat_template(chat["messages"], chat_template=data._template, tokenize=False)
    assert "".join(text for text, _ in spans) == whole.rstrip("\n") if end != "</s>" else whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_before_each_answer_stands_what_decoding_would_be_given(make_chat, family, chat):
    data = make_chat([chat], family)
    [(ids, maskable)] = documents(data)
    starts = [n for n in range(1, len(ids)) if maskable[n] and not maskable[n - 1]]
    asked = [n for n, message in enumerate(chat["messages"]) if message["role"] == "assistant"]
    for start, n in zip(starts, asked, strict=True):
        given = data.tokenizer.apply_chat_template(
            chat["messages"][:n], chat_template=data._template, add_generation_prompt=True, return_dict=False
        )
        assert ids[:start] == given


def test_system_prompts_other_roles_and_turns_in_a_row(make_chat):
    turns = [SYSTEM, *said("a", "b")["messages"], *said("c", "d", first="assistant")["messages"]]
    turns += [{"role": "tool", "content": "e"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "f"}]
    [spans] = pieces(make_chat([{"messages": turns}]))
    assert spans == [
        ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
        ("\n<|im_start|>assistant\n", False),
        ("c<|im_end|>", True),
        ("\n<|im_start|>user\nd<|im_end|>\n<|im_start|>tool\ne<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_end|>", True),
    ]


def test_an_answer_that_opens_a_conversation_is_shown(make_chat):
    [spans] = pieces(make_chat([said("hello", "a", "b", first="assistant")]))
    assert [text for text, maskable in spans if maskable] == ["b<|im_end|>"]
    assert "hello<|im_end|>" in spans[0][0]


def test_a_template_that_drops_earlier_thoughts_trains_last_answers_only(make_chat):
    chat = said("one?", "<think>\nhm\n</think>\n\n1", "two?", "<think>\nah\n</think>\n\n2")
    with pytest.raises(ValueError, match=r"^the chat template rewrites earlier turns, .*: data.turns=last$"):
        pieces(make_chat([chat], "thinking", skip_malformed=True))
    [[(prompt, _), (answer, scored)]] = pieces(make_chat([chat], "thinking", turns="last"))
    assert (answer, scored) == ("<think>\nah\n</think>\n\n2<|im_end|>", True)
    assert "hm" not in prompt and prompt.endswith(
        "1<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    [spans] = pieces(make_chat([said("one?", "1")], "thinking"))
    assert spans[1] == ("<think>\n\n</think>\n\n1<|im_end|>", True)


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(make_chat):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    for turns in ("all", "last"):
        with pytest.raises(ValueError, match=r"renders an answer otherwise than it asks for it; data.chat_template"):
            pieces(make_chat([said("a", "b")], chat_template=template, turns=turns))


def test_the_tokenizers_own_template_is_taken_unless_another_is_given(make_chat):
    data = make_chat([said("a", "b")], chat_template=None)
    with pytest.raises(ValueError, match=r"^data.chat_template must be set: .* has no chat template$"):
        pieces(data)
    data.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert pieces(data) == [[("user: a\n", False), ("assistant: b\n", True)]]
    other = make_chat([said("a", "b")], chat_template="{% for m in messages %}{{ m.content }};{% endfor %}")
    other.tokenizer.chat_template = data.tokenizer.chat_template
    assert pieces(other) == [[("a;", False), ("b;", True)]]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("nowhere.jinja", "data.chat_template: there is no file nowhere.jinja"),
        ("{% if %}", "data.chat_template: line 1"),
    ],
)
def test_a_template_that_cannot_be_had_is_refused(make_chat, template, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{sentence}"):
        pieces(make_chat([said("a", "b")], chat_template=template, skip_malformed=True))


NAMELESS = "{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}"  # asks for a key that no message has


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("template", ["chatml", NAMELESS])
def test_a_template_that_does_not_render_the_answers_is_refused(make_chat, template, turns):
    sentence = r"^data.chat_template must be a template .*; '(chatml|{% for.*)' leaves out an answer's text$"
    with pytest.raises(ValueError, match=sentence):
        pieces(make_chat([said("a", "b")], chat_template=template, turns=turns, skip_malformed=True))
    assert pieces(make_chat([said("a", " ")], chat_template=NAMELESS))  # an empty answer proves nothing


def test_a_template_may_change_white_space_and_take_thoughts_apart(make_chat):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim | replace('\n', '  ') }};"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    [spans] = pieces(make_chat([said("a", "<think>\nhm\n</think>\n\nso\nthere ")], chat_template=template))
    assert spans == [("<user>a;<assistant>", False), ("so  there;", True)]


# How a conversation ends


def ended(data):
    """(texts of the tokens after the answer, whether they are scored) of the only conversation."""
    [(ids, maskable)] = documents(data)
    answer = max(n for n, id in enumerate(ids) if id == data.tokenizer.convert_tokens_to_ids("b"))
    return [None if id == 900 else data.tokenizer.decode(id) for id in ids[answer + 1 :]], maskable[answer + 1 :]


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("block_size", [None, 1, 4, 7])
@pytest.mark.parametrize("family", ["chatml", "model_turns"])
@pytest.mark.parametrize("tail", ["eos", "mask", "none"])
def test_the_last_block_is_filled(make_chat, tail, family, block_size, length):
    data = make_chat([said("q" * length, "b")], family, block_size, tail=tail, row_length=256)
    texts, scored = ended(data)
    eos, end = data.tokenizer.eos_token, FAMILIES[family][1]
    closed = [end] if end == eos else [end, eos]
    filling = texts[len(closed) :]
    assert texts[: len(closed)] == closed and scored[: len(closed)] == [True] * len(closed)
    assert set(filling) <= {{"eos": eos, "mask": None}.get(tail)}
    assert scored[len(closed) :] == [tail == "eos"] * len(filling)
    [(ids, _)] = documents(data)
    if tail == "none" or block_size is None:
        assert not filling
    else:
        assert len(filling) < block_size and len(ids) % block_size == 0


def test_the_filling_ends_with_the_row(make_chat):
    [(ids, _)] = documents(make_chat([said("q" * 9, "b")], block_size=1))
    for row_length in range(len(ids) - 1, len(ids) + 9):
        [(filled, _)] = documents(make_chat([said("q" * 9, "b")], block_size=1000, row_length=row_length))
        assert len(filled) == max(len(ids), row_length)


def test_the_filling_ends_with_the_models_positions(make_chat):
    data = make_chat([said("q" * 9, "b")], block_size=1000, row_length=256)
    data.trainer.lightning_module.model_config.max_position_embeddings = 64
    [(ids, _)] = documents(data)
    assert len(ids) == 64


def test_a_mask_tail_is_no_mask_token_of_the_data(make_chat):
    chats = [said(f"q{n}", "answer " * n) for n in range(6)]
    data = make_chat(chats, block_size=16, tail="mask", row_length=128, mask_id=250)
    data.prepare_data()
    data.setup("fit")
    rows = data.rows["train"]
    assert sum((row["ids"] == 250).sum() for row in rows) > 0 and data.counts_V[250] == 0
    assert all(not row["maskable"][row["ids"] == 250].any() for row in rows)
    assert all((row["document"][row["ids"] == 250] >= 0).all() for row in rows)
    plain = make_chat(chats, block_size=16, tail="none", row_length=128)
    plain.prepare_data()
    plain.setup("fit")
    assert np.array_equal(data.counts_V[:250], plain.counts_V[:250])


@pytest.mark.parametrize("tail", ["eos", "mask", "none"])
def test_a_mask_token_in_the_texts_is_refused(make_chat, tail):
    with pytest.raises(ValueError, match=r"^model.mask_token: id \d+ occurs .*in the data; choose another$"):
        data = make_chat([said("a", "b")] * 3, tail=tail)
        data.trainer.lightning_module.mask_id = data.tokenizer.convert_tokens_to_ids("b")
        data.prepare_data()
        data.setup("fit")
