"""Which conversations are in which split, what names the cache, and what is said of malformed records."""

import json
import logging

import pytest
import torch

from dlm_lightning.data.chat import Chat


def said(*texts, first="user"):
    """A conversation whose turns alternate."""
    roles = [first, "user" if first == "assistant" else "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


SYSTEM = {"role": "system", "content": "be brief"}

CHATS = [said(f"q{n}", f"a{n}") for n in range(4)]


def pieces(data, split="val"):
    return [[tuple(span) for span in spans] for spans in data.texts(split)]


def test_the_splits_share_out_the_conversations_evenly(make_chat):
    chats = [said(f"q{n}", f"{n}") for n in range(40)]
    data = make_chat(chats, val_share=0.1)
    val, train = ([int(spans[1][0].removesuffix("<|im_end|>")) for spans in pieces(data, s)] for s in ("val", "train"))
    assert val == [0, 10, 20, 30] and sorted(val + train) == list(range(40))
    assert train == [n for n in range(40) if n % 10]


def test_files_kept_for_validation_are_not_trained_on(make_chat, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "kept.jsonl").write_text(json.dumps(said("x", "y")) + "\n")
    make_chat([said("a", "b")] * 2)
    data = make_chat(paths=[str(tmp_path)], val_paths=[str(tmp_path / "more")])
    assert [spans[1][0] for spans in pieces(data, "val")] == ["y<|im_end|>"]
    assert [spans[1][0] for spans in pieces(data, "train")] == ["b<|im_end|>"] * 2


def test_a_hub_set_is_read_like_a_file(make_chat, tmp_path):
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"question": f"q{n}", "answer": f"{n}", "id": n}) for n in range(4)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join([*lines, json.dumps({"question": "unanswered"})]))
    data = make_chat(hub=str(tmp_path / "set"), prompt_key="question", response_key="answer", skip_malformed=True)
    assert [spans[1][0] for s in ("val", "train") for spans in pieces(data, s)] == [f"{n}<|im_end|>" for n in range(4)]
    data.skip_malformed = False
    with pytest.raises(ValueError, match=r"set:5 has neither messages nor conversations nor question and answer"):
        pieces(data)
    assert data.identity() == data.identity() and data._hub_set._fingerprint in data.identity()
    with pytest.raises(ValueError, match=r"^data.hub: nobody/nothing, split train, cannot be loaded"):
        pieces(make_chat(hub="nobody/nothing"))


def test_what_the_rows_are_made_of_names_the_cache(make_chat):
    def name(records=CHATS, family="chatml", block_size=4, mask_id=900, **options):
        return make_chat(records, family, block_size, mask_id, **options).facts()["data"]

    assert name() == name(seed=3, mask_id=7) and name(tail="none") == name(tail="none", block_size=8)
    changes = [{"records": CHATS[:1]}, {"family": "thinking"}, {"block_size": 8}, {"turns": "last"}, {"tail": "mask"}]
    changes += [{"tail": "mask", "mask_id": 7}, {"tail": "mask", "block_size": 8}, {"tail": "none"}, {"val_share": 0.5}]
    changes += [{"skip_malformed": True}, {"prompt_key": "question"}, {"response_key": "answer"}]
    assert len({name(), *(name(**change) for change in changes)}) == 1 + len(changes)
    facts = make_chat(CHATS, turns="last", tail="none").facts()
    assert facts["data.turns"] == "last" and facts["data.tail"] == "none"


# Malformed records


BAD = ["nonsense", {"messages": []}, said("alone"), said("hello", first="assistant"), {"a": 1}, said("u", [1])]


def test_malformed_records_are_counted_and_named(make_chat, tmp_path):
    file = tmp_path / "chats.jsonl"
    with pytest.raises(ValueError) as caught:
        pieces(make_chat([said("a", "b"), *BAD, said("c", "d")]))
    sentence = str(caught.value)
    assert sentence.startswith(f"data: 6 of 8 records are malformed: {file}:2 is not JSON: ")
    assert f"; {file}:4 has no answer: no turn of the assistant after another turn (and 1 more); {file}:6 " in sentence
    assert f"{file}:5" not in sentence and sentence.endswith("; data.skip_malformed=true leaves them out")


def test_of_many_reasons_the_first_few_are_told(make_chat):
    with pytest.raises(ValueError, match=r":1 has .* it has k0; .*:5 has [^;]*; it has k4; …; data.skip_malformed"):
        pieces(make_chat([*({f"k{n}": 1} for n in range(7)), said("a", "b")]))


@pytest.mark.parametrize("skip", [False, True])
def test_when_all_are_malformed_leaving_them_out_is_no_way(make_chat, skip):
    """Questions and answers under keys of their own, the shape of many sets."""
    records = [{"question": f"q{n}", "answer": f"{n}"} for n in range(1001)]
    with pytest.raises(ValueError) as caught:
        pieces(make_chat(records, skip_malformed=skip))
    sentence = str(caught.value)
    assert sentence.startswith("data: 1001 of 1001 records are malformed: ")
    assert sentence.count("has neither") == 1 and sentence.endswith(
        "prompt and response (data.prompt_key and data.response_key); it has question, answer (and 1,000 more)"
    )
    assert pieces(make_chat(records, prompt_key="question", response_key="answer"))


def test_malformed_records_are_left_out_if_asked(make_chat, caplog):
    data = make_chat([said("a", "b"), *BAD, said("c", "d")], skip_malformed=True)
    with caplog.at_level(logging.INFO, "dlm_lightning"):
        answers = [spans[1][0] for split in ("train", "val") for spans in pieces(data, split)]
    assert sorted(answers) == ["b<|im_end|>", "d<|im_end|>"]
    [record] = caplog.records
    assert record.getMessage().startswith("data: 6 of 8 records are malformed: ")
    assert record.getMessage().endswith("; they are left out")


@pytest.mark.parametrize(
    ("family", "turns", "reason"),
    [
        ("inst", [SYSTEM, *said("a", "b")["messages"]], "Conversation roles must alternate"),
        ("model_turns", [SYSTEM, *said("a", "b")["messages"]], "System role not supported"),
        ("inst", [*said("a", "b")["messages"]] + said("a", first="assistant")["messages"], "roles must alternate"),
    ],
)
def test_what_the_template_refuses_is_malformed(make_chat, family, turns, reason):
    with pytest.raises(
        ValueError, match=rf"1 of 2 records are malformed: .*:2 is refused by the chat template: .*{reason}"
    ):
        pieces(make_chat([said("a", "b"), {"messages": turns}], family))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give one of data.paths .* and data.hub"),
        ({"paths": ["a"], "hub": "b"}, "give one of data.paths .* and data.hub"),
        ({"paths": ["a"], "val_share": 1.0}, "data.val_share must lie between 0 and 1, not 1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Chat(**options)


def test_a_model_without_a_source_is_refused(attach, make_chat):
    data = make_chat([said("a", "b")], vocab_size=300)
    data.tokenizer = None
    data.trainer.lightning_module.source = None
    with pytest.raises(ValueError, match=r"^data: chats need model.source"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.parquet", b"no table", "a.parquet cannot be read: Parquet magic bytes not found"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.json", json.dumps(CHATS).encode(), "a.json holds a JSON array; expected are JSON lines"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_named_by_a_run(make_chat, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{sentence}"):
        make_chat(paths=[str(tmp_path / name)], skip_malformed=True).prepare_data()


# An epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_holds_every_conversation_once_in_one_order_on_any_ranks(make_chat, workers):
    chats = [said(f"q{n}", f"<{n}>") for n in range(61)]

    def epoch(ranks, workers):
        loaders = []
        for rank in range(ranks):
            data = make_chat(chats, row_length=192, batch_size=4 // ranks, num_workers=workers, tail="eos")
            data.trainer.__dict__.update(world_size=ranks, global_rank=rank, max_steps=20)
            data.prepare_data()
            data.setup("fit")
            loaders.append(iter(data.train_dataloader()))
        batches = [batch for together in zip(*loaders, strict=True) for batch in together]
        return data, [torch.cat(tensors)[: len(data.rows["train"])] for tensors in zip(*batches, strict=True)]

    data, alone = epoch(1, 0)
    for ranks in (1, 2, 4):
        assert all(torch.equal(a, b) for a, b in zip(alone, epoch(ranks, workers)[1], strict=True))
    text = "".join(data.tokenizer.decode(ids) for ids in alone[0])
    assert all(text.count(f"<{n}>") == 1 for n in range(1, 61)) and "<0>" not in text
