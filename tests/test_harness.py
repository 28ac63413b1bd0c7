"""lm-evaluation-harness: likelihoods against transformers' own, generations against the decoder, tasks offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import exact
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.harness.model import Estimate, HarnessModel
from dlm_lightning.likelihood import Blocks, bound, turns
from dlm_lightning.view import AUTOREGRESSIVE, Pattern

PAIRS = [("the quick brown", " fox jumps"), ("over the lazy", " dog while seven wizards"), ("", "box and judge")]


def request(*args, number: int = 0) -> SimpleNamespace:
    return SimpleNamespace(args=args, doc_id=number)


@pytest.fixture
def model(make_denoiser, tiny_tokenizer):
    def make(pattern: Pattern = Pattern(4, "clean"), shift: str = "none", length: int = 64, batch: int = 8, **estimate):
        denoiser = make_denoiser(pattern=pattern, shift=shift)
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
        plan = Plan(cache=exact(denoiser))
        return HarnessModel(denoiser, tokenizer, plan, Estimate(**estimate), length, batch)

    return make


@pytest.fixture
def theirs(source_folder):
    """log p(continuation | context) of transformers' own causal model."""
    network = AutoModelForCausalLM.from_pretrained(source_folder()).eval()

    @torch.no_grad()
    def score(context: list[int], continuation: list[int]) -> float:
        ids = torch.tensor([[*context, *continuation]])
        logits_SV = network(ids).logits[0].log_softmax(-1)
        places = range(len(context), ids.shape[1])
        return sum(logits_SV[i - 1, ids[0, i]].item() for i in places)

    return score


def test_an_ar_models_likelihood_is_transformers_own(model, theirs):
    own = model(AUTOREGRESSIVE, "next_token")
    found = own.loglikelihood([request(*pair, number=n) for n, pair in enumerate(PAIRS)])
    for (likelihood, _), pair in zip(found, PAIRS, strict=True):
        context, continuation = own.pair(*pair)
        assert own.tokenizer.decode(continuation) == pair[1]
        assert likelihood == pytest.approx(theirs(context, continuation), rel=1e-4)


@pytest.mark.parametrize("pattern", [Pattern(4, "clean"), Pattern(None)], ids=["blocks", "document"])
def test_the_chain_rule_scores_every_token_from_left_to_right(pattern, model, plain_logits):
    own = model(pattern, method="chain")
    context, continuation = own.pair(*PAIRS[1])
    ids, total = torch.tensor([*context, *continuation]), 0.0
    for i in range(len(context), len(ids)):
        end = min(i // 4 * 4 + 4, len(ids)) if pattern.block_size else len(ids)
        shown = torch.where(torch.arange(end) < i, ids[:end], 300)
        q, k = torch.arange(end)[:, None], torch.arange(end)[None]
        mask = q // 4 >= k // 4 if pattern.block_size else torch.ones(end, end, dtype=torch.bool)
        logits_V = plain_logits(own.denoiser, shown, torch.arange(end), mask)[i]
        logits_V[300] = -torch.inf
        total += logits_V.log_softmax(0)[ids[i]].item()
    [(likelihood, _)] = own.loglikelihood([request(*PAIRS[1])])
    assert likelihood == pytest.approx(total, rel=1e-4)


def test_a_bound_is_the_mean_over_its_draws_and_all_tokens_count(model):
    own = model(samples=3, seed=5)
    pair = own.pair(*PAIRS[1])
    [found] = own.score([pair], [7])
    totals = []
    for draw in range(3):
        batch = own._lay_out([pair], [7], draw)
        assert batch.maskable_BL.sum() == len(pair[1])
        count = turns(own.denoiser, batch, Blocks(4))
        with torch.no_grad():
            totals.append(sum(bound(own.denoiser, batch, Blocks(4), t).share_BL.sum().item() for t in range(count)))
    assert len(set(totals)) == 3
    assert found == pytest.approx(-sum(totals) / 3, rel=1e-5)


def test_likelihoods_depend_on_neither_batch_nor_company(model):
    pairs = [model().pair(*pair) for pair in PAIRS]
    alone = [model(batch=1, samples=2).score([pair], [n])[0] for n, pair in enumerate(pairs)]
    together = model(batch=8, samples=2).score(pairs, [0, 1, 2])
    assert together == pytest.approx(alone, rel=1e-4)


def test_on_a_gpu_rows_have_few_lengths_which_likelihoods_do_not_depend_on(model):
    own = model(samples=2)
    pairs = [own.pair(*pair) for pair in PAIRS]
    found = own.score(pairs, [0, 1, 2])
    own._row_length = lambda longest: min(own.length, longest + 30)
    assert own.score(pairs, [0, 1, 2]) == pytest.approx(found, rel=1e-4)
    del own._row_length
    assert own._row_length(77) == 77
    own._device, own.length = torch.device("cuda"), 2000
    assert [own._row_length(n) for n in (77, 256, 257, 1999)] == [256, 256, 512, 2000]


def test_choices_of_a_question_have_the_same_noise_and_questions_have_not(model):
    own = model(samples=1)
    pair, longer = own.pair("the quick", " brown"), own.pair("the quick", " brown fox jumps over")
    same, other = own._lay_out([pair, longer], [4, 4], 0), own._lay_out([pair, pair], [4, 5], 0)
    assert torch.equal(same.u_BL[0], same.u_BL[1]) and torch.equal(same.t_BL[0], same.t_BL[1])
    assert not torch.equal(other.u_BL[0], other.u_BL[1])
    levels = torch.stack([own._lay_out([pair], [4], draw).t_BL[0, 0] for draw in range(16)])
    assert sorted((levels * 16).ceil().tolist()) == list(range(1, 17))


def test_rolling_scores_each_token_once(model, theirs):
    text = "the quick brown fox jumps over the lazy dog while seven wizards box"
    short, whole = model(AUTOREGRESSIVE, "next_token", length=12), model(AUTOREGRESSIVE, "next_token")
    ids, eos = short._ids(text), short.tokenizer.eos_token_id
    assert len(ids) > 24
    [found] = whole.loglikelihood_rolling([request(text)])
    assert found == pytest.approx(theirs([eos], ids), rel=1e-4)
    [found] = short.loglikelihood_rolling([request(text)])
    wanted = theirs([eos], ids[:11])
    for first in range(11, len(ids), 11):
        last = min(first + 11, len(ids))
        wanted += theirs(ids[last - 12 : first], ids[first:last])
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_greedy_continuation_is_known_as_one(model):
    own = model()
    context = own.pair("the quick", " x")[0]
    plan = Plan(cache=exact(own.denoiser), stopper=Stopper(5, eos=False))
    written = decode(own.denoiser, [context], plan).rows[0].new_ids
    assert own._greedy([(context, written), (context, written[:2])])[1][:2] == written[:2]
    own.pair = lambda *args: (context, args[1])  # tokens of random weights need not survive a tokenizer
    wrong = [*written[:-1], (written[-1] + 1) % 300]
    found = own.loglikelihood([request("", written), request("", written[:3]), request("", wrong)])
    assert [greedy for _, greedy in found] == [True, True, False]


def test_generation_is_the_plans_up_to_a_stop_string(model):
    own = model()
    prompts = ["the quick brown", "over the lazy dog while"]
    found = own.generate_until([request(prompt, {"until": [], "max_gen_toks": 12}) for prompt in prompts])
    plan = Plan(cache=exact(own.denoiser), stopper=Stopper(12))
    for prompt, text in zip(prompts, found, strict=True):
        row = decode(own.denoiser, [own._ids(prompt)], plan, eos_ids=[own.tokenizer.eos_token_id]).rows[0]
        assert text == own.tokenizer.decode(row.new_ids, skip_special_tokens=True)
    stop = found[0][3:5]
    [cut] = own.generate_until([request(prompts[0], {"until": stop, "max_gen_toks": 12})])
    assert cut == found[0][: found[0].index(stop)]


@pytest.mark.parametrize("options, message", [({"method": "guess"}, "bound or chain"), ({"samples": 0}, "at least 1")])
def test_what_is_no_estimate_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Estimate(**options)


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder of local tasks on a JSONL file: choices, generation, a rolling likelihood."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        {"q": "the quick brown", "choices": [" fox", " dog over lazy"], "label": n % 2, "text": "the quick brown fox"}
        for n in range(5)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    bits = [{"metric": "bits_per_byte"}]
    kinds = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": metric,
        },
        "local_text": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "fox",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": match,
        },
        "local_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": bits,
        },
    }
    for name, own in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **own}))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_local_tasks_through_the_command(finished, tasks, typed, tmp_path):
    words = ["--tasks", "local_choice,local_text", "local_rolling", "--include", tasks, "--samples", 2]
    said = typed("eval", finished, *words, cwd=tmp_path)
    assert said.code == 0, said.err
    found = json.loads((finished / "lm_eval.json").read_text())
    assert set(found["results"]) == {"local_choice", "local_text", "local_rolling"}
    assert 0 <= found["results"]["local_choice"]["acc,none"] <= 1
    assert found["results"]["local_rolling"]["bits_per_byte,none"] > 0
    assert found["dlm_lightning"]["likelihood"] == {"method": "bound", "samples": 2, "seed": 0}
    assert found["dlm_lightning"]["plan"]["selector"]["class"] == "Threshold"
    samples = [json.loads(line) for line in (finished / "lm_eval_samples.jsonl").read_text().splitlines()]
    assert len(samples) == 15
    assert not (finished / "evaluation.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_weights_in_bfloat16_are_nearly_as_likely(finished, tasks, typed, tmp_path):
    words = ["--tasks", "local_rolling", "--include", tasks, "--samples", 2]
    bits = []
    for precision in ("32-true", "bf16-true"):
        assert typed("eval", finished, *words, "--precision", precision, cwd=tmp_path).code == 0
        found = json.loads((finished / "lm_eval.json").read_text())
        assert found["dlm_lightning"]["precision"] == precision
        bits.append(found["results"]["local_rolling"]["bits_per_byte,none"])
    assert bits[0] != bits[1] and bits[1] == pytest.approx(bits[0], rel=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_ranks_share_out_the_questions(finished, tasks, typed, row_cache, tmp_path):
    words = ["--tasks", "local_choice", "local_rolling", "--include", str(tasks), "--samples", "2"]
    assert typed("eval", finished, *words, cwd=tmp_path).code == 0
    alone = json.loads((finished / "lm_eval.json").read_text())["results"]
    (finished / "lm_eval.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "dlm_lightning.cli", "eval", str(finished), *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(row_cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    together = json.loads((finished / "lm_eval.json").read_text())["results"]
    for task, metric in (("local_choice", "acc,none"), ("local_rolling", "bits_per_byte,none")):
        assert together[task][metric] == pytest.approx(alone[task][metric], rel=1e-5)
    assert done.stdout.count("lm_eval.json") == 1


def test_what_cannot_be_asked_is_refused(finished, tasks, refused, tmp_path):
    for words, message in (
        (["--tasks", "local_choise", "--include", tasks], "there is no task local_choise, here or in the harness"),
        (["--tasks", "local_text", "--include", "nowhere"], "--include nowhere: there is no such folder"),
        (["--tasks", "local_text", "--include", tasks, "--samples", "0"], "--samples must be at least 1"),
        (["--tasks", "local_text", "--include", tasks, "--likelihood", "x"], "must be bound or chain"),
        (["--tasks", "local_text", "--include", tasks, "--batch", "0"], "--batch must be at least 1"),
        (["--tasks", "local_text", "--include", tasks, "--chat"], "no chat template"),
    ):
        assert message in refused("eval", finished, *words, cwd=tmp_path)


@pytest.mark.parametrize("words", [["--limit", "5"], ["--tasks", "copy", "--chat"], ["--precision", "bf16-true"]])
def test_options_of_the_harness_want_its_tasks(finished, words, typed, tmp_path):
    said = typed("eval", finished, *words, cwd=tmp_path)
    assert said.code == 2 and "is for tasks of lm-evaluation-harness, and --tasks names none of them" in said.err


def test_prompts_are_of_this_projects_tasks(finished, tasks, typed, tmp_path):
    said = typed("eval", finished, "--tasks", "local_text", "--include", tasks, "--prompts", 4, cwd=tmp_path)
    assert said.code == 2 and "--prompts is for tasks of this project" in said.err
