"""`dlm generate`: what is printed is what the decoder makes of the run's own weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlm_lightning.catalog import plans
from dlm_lightning.checkpoint import agree
from dlm_lightning.decode.decoder import decode
from dlm_lightning.generate import read
from dlm_lightning.reopening import restore

FIGURES = re.compile(
    r"^[\d,]+ tokens in [\d,]+ forwards, [\d.]+ per forward; [\d.,]+ per second; \d+% of what was seen "
)
DOCUMENT = Path(__file__).parents[1] / "docs" / "decoding.md"
SHORT = "stopper.new_tokens=7"


def by_decoder(run, prompts: list[str], plan: str = "block", words=(SHORT,)) -> list[str]:
    _, recipe, _ = restore(str(run))
    denoiser = recipe.eval().denoiser
    ids = [recipe.tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = decode(denoiser, ids, read(plan, words), text=recipe.tokenizer.decode).rows
    return [recipe.tokenizer.decode(row.new_ids, skip_special_tokens=True) for row in rows]


def test_prompts_are_continued(finished, typed, tmp_path):
    said = typed("generate", "done", "--prompt", "the quick", "--prompt", "jumps", SHORT, cwd=tmp_path)
    expected = by_decoder(finished, ["the quick", "jumps"])
    assert (said.code, said.out) == (0, f"the quick{expected[0]}\njumps{expected[1]}\n")
    assert FIGURES.match(said.err)


@pytest.mark.parametrize("plan", [name for name in plans() if name != "autoregressive"])
def test_every_shipped_plan_decodes_a_model_with_blocks(finished, typed, tmp_path, plan):
    words = [SHORT, "part_size=4"] if plan == "sub_block" else [SHORT]
    said = typed("generate", "done", "--prompt", "the quick", "--plan", plan, *words, cwd=tmp_path)
    assert (said.code, said.out) == (0, f"the quick{by_decoder(finished, ['the quick'], plan, words)[0]}\n"), said.err


def test_a_file_is_a_prompt_and_out_a_new_file(finished, typed, tmp_path):
    (tmp_path / "prompt.txt").write_text("the quick")
    words = ["generate", "done", "--file", "prompt.txt", SHORT, "--out", "text"]
    said = typed(*words, cwd=tmp_path)
    assert (said.code, said.out) == (0, "")
    assert (tmp_path / "text").read_text() == f"the quick{by_decoder(finished, ['the quick'])[0]}\n"
    assert typed(*words, cwd=tmp_path).err == "dlm: text is there already; name a new file by --out\n"


def test_json_lines_keep_what_else_they_say(finished, typed, tmp_path):
    prompts = ["the quick", "jumps", "over"]
    lines = [json.dumps({"prompt": prompt, "number": n}) for n, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines) + "\n")
    said = typed("generate", "done", "--jsonl", "prompts.jsonl", "--batch", "2", SHORT, cwd=tmp_path)
    records = [json.loads(line) for line in said.out.splitlines()]
    assert [record["text"] for record in records] == by_decoder(finished, prompts)
    assert [(record["prompt"], record["number"]) for record in records] == [*zip(prompts, range(3), strict=True)]
    assert all(record["tokens"] == 7 and 1 <= record["forwards"] <= 7 for record in records)


def test_what_is_drawn_does_not_depend_on_the_batch(finished, typed, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the quick"}\n' * 3)
    words = ["generate", "done", "--jsonl", "prompts.jsonl", SHORT, "sampling.temperature=3"]
    one, three = (typed(*words, "--batch", n, cwd=tmp_path).out for n in (1, 3))
    assert one == three and len(set(one.splitlines())) == 3


def test_a_stop_string_is_cut_off(finished, typed, tmp_path):
    [text] = by_decoder(finished, ["the quick"])
    stop = json.dumps(text[2:4])
    said = typed("generate", "done", "--prompt", "the quick", SHORT, f"stopper.strings=[{stop}]", cwd=tmp_path)
    assert (said.code, said.out) == (0, f"the quick{text[: text.index(text[2:4])]}\n")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shift", "next_token", "the checkpoint was made with model.shift none, this run has next_token"),
        ("mask_token", 5, "the checkpoint was made with model.mask_id"),
        ("block_size", 4, "the checkpoint was made with model.block_size"),
    ],
)
def test_weights_are_not_read_otherwise_than_they_were_trained(finished, refused, tmp_path, key, value, message):
    run = shutil.copytree(finished, tmp_path / "edited")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert message in refused("generate", str(run), "--prompt", "the quick", cwd=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no plan: a plan is keys and values"),
        ("[1, 2]", "is no plan: a plan is keys and values"),
        ("a: [", "is not YAML"),
        ("selector: null", "selector must not be null"),
        ("stopper: {new_tokens: null}", "stopper.new_tokens must not be null"),
        ("sampling: null", "sampling must not be null"),
        ("selector: {class_path: dlm_lightning.decode.selector.Selector}", "Selector"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(Exception, match=message):  # jsonargparse has errors of its own
        read(str(tmp_path / "mine.yaml"), [])


def test_out_is_left_behind_only_with_something_in_it(finished, refused, typed, tmp_path, monkeypatch):
    words = ["generate", "done", "--prompt", "the quick", SHORT, "--out", "new.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("dlm_lightning.generate.decode", lambda *_, **__: pytest.fail("decoding failed"))
        with pytest.raises(pytest.fail.Exception):
            typed(*words, cwd=tmp_path)
    assert not (tmp_path / "new.txt").exists()
    assert typed(*words, cwd=tmp_path).code == 0 and (tmp_path / "new.txt").read_text()


def test_a_line_ends_where_json_lines_do(finished, typed, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the\u2028quick"}\n\n', encoding="utf-8")
    said = typed("generate", "done", "--jsonl", "prompts.jsonl", SHORT, cwd=tmp_path)
    assert said.code == 0 and [json.loads(line)["prompt"] for line in said.out.splitlines()] == ["the\u2028quick"]


def test_a_checkpoint_without_its_mask_id_is_refused(finished):
    _, recipe, _ = restore(str(finished))
    with pytest.raises(ValueError, match=r"^the checkpoint does not state model.mask_id, this run has \d+$"):
        agree({name: fact for name, fact in recipe.reading().items() if name != "model.mask_id"}, recipe.reading())


def test_the_documents_example_runs(finished, capsys):
    [example] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(example.replace("runs/block_causal/1", str(finished)).replace("Stopper(64)", "Stopper(7)"), {})
    *new_ids, per_forward = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert len(new_ids) <= 7 and float(per_forward) > 0


def test_in_bfloat16_it_decodes_as_transformers_does_with_such_weights(finished, typed, tmp_path):
    assert typed("export", "done", "exported", cwd=tmp_path).code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="bfloat16", trust_remote_code=True)
    prompts = ["the quick", "jumps", "over the lazy dog"]
    rows = (network.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40)[0] for prompt in prompts)
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    said = typed("generate", "done", *words, "--precision", "bf16-true", "stopper.new_tokens=40", cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.out == "".join(f"{tokenizer.decode(row, skip_special_tokens=True)}\n" for row in rows)
    exact = by_decoder(finished, prompts, words=["stopper.new_tokens=40"])
    assert said.out != "".join(f"{prompt}{text}\n" for prompt, text in zip(prompts, exact, strict=True))


def test_without_a_compiler_compile_is_refused(finished, refused, tmp_path):
    with inductor.patch({"cpp.cxx": (None, "/nowhere")}):
        said = refused("generate", "done", "--prompt", "the quick", "--compile", SHORT, cwd=tmp_path)
    assert "--compile: torch.compile cannot compile this network here: InvalidCxxCompiler" in said


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_network_continues_the_same(finished, typed, tmp_path):
    said = typed("generate", "done", "--prompt", "the quick", "--prompt", "jumps", "--compile", SHORT, cwd=tmp_path)
    expected = by_decoder(finished, ["the quick", "jumps"])
    assert (said.code, said.out) == (0, f"the quick{expected[0]}\njumps{expected[1]}\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--plan", "blok"], "there is no plan blok; did you mean block?"),
        (["--prompt", "a", "--plan", "mine.yaml"], "there is no plan file mine.yaml"),
        (
            ["--prompt", "a", "--plan", "autoregressive"],
            "the autoregressive decoder needs a model whose tokens see only",
        ),
        (["--prompt", "a", "selector.threshold=1.5"], "threshold must lie in (0, 1], not 1.5"),
        (["--prompt", "a", "selector.treshold=0.5"], "selector.treshold: Threshold takes no such key"),
        (["--prompt", "a", "stopper.new_tokens=-1"], "new_tokens must be at least 0"),
        (["--prompt", "a", "stopper.new_tokens=1000"], "1000 are to come; the model has 256 positions"),
        (["--prompt", "a", "nonsense=1"], "there is no key nonsense"),
        (["--prompt", "a", "--batch", "0"], "--batch must be at least 1, not 0"),
        (["--prompt", "a", "--chat"], "the run has no chat template"),
        (["--prompt", "a", "--device", "nowhere"], "--device nowhere"),
        (["--file", "missing"], "missing"),
        (["--prompt", "a\ud800b"], "a prompt holds what is no character"),
        (["--prompt", "a", "--device", "meta"], "--device meta: there is no such device here"),
        (["--prompt", "a", "--device", "hpu"], "--device hpu: there is no such device here"),
        (["--prompt", "a", "--out", "nowhere/x"], "--out nowhere/x: there is no folder nowhere"),
        (["--prompt", "a", "config=x.yaml"], "there is no key config of a plan"),
        (
            ["--prompt", "a", "stoper.new_tokens=3"],
            "there is no key stoper.new_tokens of a plan; did you mean stopper?",
        ),
        (["--prompt", "a", "selector.threshold=null"], "selector.threshold must not be null"),
        (["--prompt", "a", "sampling.seed=-1"], "seed must lie in [0, 2**64), not -1"),
        (["--jsonl", "missing"], "missing"),
    ],
)
def test_wrong_input_is_refused(finished, refused, tmp_path, words, message):
    assert message in refused("generate", "done", *words, cwd=tmp_path)


@pytest.mark.parametrize(
    "line, message", [("{", "line 2 is not JSON"), ("{}", "line 2 has neither"), ("3", "line 2 has")]
)
def test_wrong_lines_are_refused_before_anything_is_decoded(finished, refused, tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    words = ["--jsonl", "prompts.jsonl", "--out", "out", "--batch", "1", SHORT]
    assert message in refused("generate", "done", *words, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_chat_is_asked_for_as_in_training(finished, typed, tmp_path):
    """By the run's own template, from a prompt or from messages."""
    template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    path = finished / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"] = {
        "class_path": "dlm_lightning.data.chat.Chat",
        "init_args": {"paths": ["x"], "chat_template": template},
    }
    path.write_text(yaml.safe_dump(config))
    messages = [{"role": "user", "content": "the quick"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "jumps"}))
    said = typed("generate", "done", "--jsonl", "chats.jsonl", SHORT, cwd=tmp_path)
    answers = [json.loads(line)["text"] for line in said.out.splitlines()]
    assert answers == by_decoder(finished, ["<user> the quick <a>", "jumps"])
    said = typed("generate", "done", "--chat", "--prompt", "the quick", SHORT, cwd=tmp_path)
    assert said.out == answers[0] + "\n"
