"""`dlm bench`, on the tiny source."""

from __future__ import annotations

import json

import pytest
import torch

from dlm_lightning.bench import Request, _claimed, _contest, growth, measure


@pytest.fixture
def bench(small):
    """`bench(*words)`: the words of a command of two turns."""
    return lambda *words: ["bench", *small(), "--turns", 2, *words]


def contests(folder):
    return json.loads((folder / "bench.json").read_text())["contests"]


def test_recipes_are_measured_beside_baselines_and_an_ar_step(bench, typed, tmp_path):
    recipes = ["block_causal", "complementary_mask"]
    said = typed(*bench(*recipes, "--baseline", "peers", "fair", "model.block_size=8"), cwd=tmp_path)
    assert said.code == 0, said.err
    folder = tmp_path / said.out.splitlines()[-1]
    assert folder == tmp_path / "runs" / "bench" / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png"]
    found = contests(folder)
    assert [contest["recipe"] for contest in found] == recipes
    for contest in found:
        assert [arm["name"] for arm in contest["arms"]] == ["ours", "peers", "fair", "ar"]
        assert all(len(arm["seconds"]) == 2 and arm["memory"] > 0 for arm in contest["arms"])
        assert [arm["data"] for arm in contest["arms"]] == [4 * 24] * 4
        ours, peers, _, _ = contest["arms"]
        assert peers["scored"] == ours["scored"] and peers["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert [arm["forward"] for arm in found[1]["arms"]] == [3 * 96, 4 * 96, 4 * 96, 96]
    for name in ("× AR", "× ours", *recipes):
        assert name in said.out


def test_a_key_grows(bench, typed, tmp_path):
    words = bench("block_causal", "--growth", "data.row_length=8,16", "--out", "grown", "--baseline=fair")
    said = typed(*words, cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "grown"
    assert [(c["value"], c["arms"][0]["data"]) for c in contests(tmp_path / "grown")] == [("8", 32), ("16", 64)]


def test_documents_grow(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = measure(Request(["block_causal"], small(), turns=1, growth=("documents", ["1", "4"])))
    assert [contest.arm("ar").scored for contest in record.contests] == [4 * 23, 4 * 20]


def test_a_vocabulary_grows_where_there_is_no_source(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = "{model_type: qwen3, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1}"
    words = [*small(), "model.source=null", f"model.config={config}"]
    sizes = []
    monkeypatch.setattr(
        "dlm_lightning.bench.forward_tokens",
        lambda step, arm: sizes.append(step.recipe.denoiser.network.config.vocab_size) or 0,
    )
    measure(Request(["block_causal"], words, turns=1, growth=("data.vocab_size", ["99", "199"])))
    assert sizes == [100, 100, 200, 200]


def test_mfu_by_a_peak_that_is_named(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = measure(Request(["block_causal"], small(), turns=1, tflops=0.5))
    assert record.peak == 5e11
    assert all(arm.flops > 0 for arm in record.contests[0].arms)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_gpu_is_measured(precision, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*small(), "trainer.accelerator=gpu", f"trainer.precision={precision}"]
    record = measure(Request(["complementary_mask"], words, ["peers", "fair"], turns=1))
    assert record.device == torch.cuda.get_device_name()
    assert all(arm.memory > 0 for arm in record.contests[0].arms)


# Bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["blok_causal"], "did you mean block_causal?"),
        (["block_causal", "--baseline", "peer"], "there is no baseline peer, only peers and fair; did you mean peers?"),
        (["block_causal", "--turns", "0"], "--turns must be at least 1, not 0"),
        (["block_causal", "--documents", "0"], "--documents must be at least 1, not 0"),
        (["block_causal", "--documents", "13"], "documents must lie between 1 and half of data.row_length, 12, not 13"),
        (["block_causal", "--tflops", "0"], "--tflops must be above 0 and finite, not 0.0"),
        (["block_causal", "--growth", "data.row_length"], "--growth data.row_length needs values"),
        (["block_causal", "--growth", "data.row_length=,"], "needs values"),
        (["block_causal", "--growth", "length=3"], "what grows is a key of a recipe, such as data.row_length, or doc"),
        (["block_causal", "--growth", "data.row_length=16,,24"], "needs values"),
        (
            ["block_causal", "--growth", "documents=1,13"],
            "documents must lie between 1 and half of data.row_length, 12",
        ),
        (["block_causal", "--growth", "documents=1,2", "--documents", "2"], "contradict each other"),
        (["block_causal", "model.attention=flex"], "model.attention: flex does not compute this recipe's views"),
        (["block_causal", "--out", "full/file/below"], "--out full/file/below cannot be made"),
        (["block_causal", "--growth", "documents=1,two"], "two is no whole number above 0"),
        (["block_causal", "--growth", "data.row_lenght=16"], "row_lenght"),
        (["block_causal", "--growth", "data.vocab_size=99"], "data.vocab_size must be null: the source brings its own"),
        (["block_causal", "--out", ""], "--out needs the name of a folder"),
        (["block_causal", "--out", "full"], "--out full already holds something; name a new folder"),
        (["block_causal", "--out", "full/file"], "--out needs the name of a folder, not 'full/file'"),
        (["block_causal", "model.block_sise=3"], "block_sise"),
        (["block_causal", "--growth", "data.row_length=²"], "² is no whole number above 0"),
        (["block_causal", "data.vocab_size=0"], "data.vocab_size must be between 1 and 16,777,216, not 0"),
        (["block_causal", "trainer.precision=16-mixed"], "must be one of 32-true, bf16-mixed, bf16-true, not 16-mixed"),
    ],
)
def test_bad_input_is_one_sentence(words, says, bench, refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert says in refused(*bench(*words), cwd=tmp_path)


@pytest.mark.parametrize("out", [None, "mine", "new/below"])
def test_a_measurement_that_fails_leaves_what_was_there(out, bench, typed, tmp_path):
    (tmp_path / "mine").mkdir()
    words = ["--out", out] if out else []
    assert typed(*bench("block_causal", "model.attention=flex", *words), cwd=tmp_path).code == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_measurement_that_fails_late_keeps_what_it_has(bench, typed, tmp_path, monkeypatch):
    """As one that grows until the memory is full."""
    own = _contest

    def until_16(request, recipe, value):
        if value == "16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(request, recipe, value)

    monkeypatch.setattr("dlm_lightning.bench._contest", until_16)
    said = typed(*bench("block_causal", "--growth", "data.row_length=8,16", "--out", "grown"), cwd=tmp_path)
    assert said.code == 1 and "out of memory" in said.err
    assert "grown/bench.json holds what was measured until then" in said.out
    assert [contest["value"] for contest in contests(tmp_path / "grown")] == ["8"]


def test_two_measurements_at_once_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _claimed(None) as one, _claimed(None) as two, _claimed("mine") as third:
        assert [str(one), str(two), str(third)] == ["runs/bench/1", "runs/bench/2", "mine"]
        with pytest.raises(FileExistsError, match="--out mine already holds something"), _claimed("mine"):
            pass


@pytest.mark.parametrize(
    "words", [["bench"], ["bench", "model.block_size=3"], ["bench", "block_causal", "--turns", "x"]]
)
def test_a_wrong_command_line_is_2(words, typed, tmp_path):
    assert typed(*words, cwd=tmp_path).code == 2


def test_growth_is_a_key_and_its_values():
    assert growth("documents=4, 2,1,4") == ("documents", ["1", "2", "4"])
