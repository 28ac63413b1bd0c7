"""The AR source: found, opened, read slice by slice, and built into a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlm_lightning.errors import sentence
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.source import Source, build, build_config, decoder_layers, locate

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(source_folder, tmp_path) -> Path:
    """A source that a test may damage."""
    return shutil.copytree(source_folder("qwen3"), tmp_path / "source")


@pytest.fixture(scope="module")
def sharded(source_folder, tmp_path_factory) -> Path:
    """The same source in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "source"
    shutil.copytree(source_folder("qwen3"), folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / INDEX).is_file()
    return folder


@pytest.fixture(params=["one file", "sharded"])
def either(request, source_folder, sharded) -> Path:
    return sharded if request.param == "sharded" else source_folder("qwen3")


def test_slices_equal_the_tensors_that_transformers_loads(either):
    source, network = Source(str(either)), AutoModelForCausalLM.from_pretrained(either)
    state = network.state_dict()
    assert len(state) > 20
    for name, tensor in state.items():
        assert name in source
        assert source.rows(name) == len(tensor)
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read(name, 3, 7), tensor[3:7]), name
        assert torch.equal(source.read(name, len(tensor) - 1), tensor[-1:]), name
        assert source.read(name, 5, 5).shape == (0, *tensor.shape[1:])


@pytest.mark.parametrize("method", ["read", "rows"])
def test_a_tensor_that_is_not_there(either, method):
    source = Source(str(either))
    assert "model.nothing" not in source
    with pytest.raises(ValueError) as error:
        getattr(source, method)("model.nothing")
    assert sentence(error.value) == f"model.source: {either} has no tensor model.nothing"


def test_the_config_is_a_new_copy_at_each_call(source_folder):
    source = Source(str(source_folder()))
    source.config.vocab_size = 7
    assert source.config.vocab_size == 300


def test_the_fingerprint_is_of_the_weights_and_not_of_the_place(either, tmp_path):
    copy = shutil.copytree(either, tmp_path / "copy")
    assert Source(str(copy)).fingerprint() == Source(str(either)).fingerprint()
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert Source(str(copy)).fingerprint() == Source(str(either)).fingerprint()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_norm.weight"]
)
def test_the_fingerprint_changes_with_one_weight(name, folder):
    before = Source(str(folder)).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert Source(str(folder)).fingerprint() != before


# Where a source is


def test_a_run_folder_is_its_model_and_a_folder_of_runs_its_newest_finished(source_folder, tmp_path):
    for number in ("2", "9", "10"):
        shutil.copytree(source_folder(), tmp_path / "runs" / number / "model")
    (tmp_path / "runs" / "11").mkdir()  # not finished
    (tmp_path / "runs" / "99.old").mkdir()
    assert locate(str(tmp_path / "runs" / "2")) == tmp_path / "runs" / "2" / "model"
    assert locate(str(tmp_path / "runs")) == tmp_path / "runs" / "10" / "model"


def test_a_home_folder_is_understood(source_folder, monkeypatch):
    folder = source_folder()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate(f"~/{folder.name}") == folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", "there is no folder gone$"),
        ("./gone/model", "there is no folder ./gone/model$"),
        ("runs/ar_source", "there is no folder runs/ar_source; `dlm fit ar_source` trains one"),
        ("someone/something", "someone/something is no local folder and cannot be fetched from the hub"),
        ("../someone", r"there is no folder \.\./someone"),
        ("some one/some?thing", "is no local folder and cannot be fetched from the hub"),
    ],
)
def test_what_is_nowhere_is_named(name, says, tmp_path, monkeypatch):
    """Runs without a network: HF_HUB_OFFLINE is set in conftest."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"model.source: .*{says}"):
        Source(name)


def test_a_folder_without_config_or_weights_is_named(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    with pytest.raises(FileNotFoundError, match=r"model.source: .* config but no weights \(model.safetensors\)"):
        Source(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.source: .* no model \(no config.json in it\)"):
        Source(str(folder))


def test_an_index_that_names_missing_shards_names_them(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "source")
    shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    for shard in shards[:2]:
        (folder / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"model.source: {folder} lacks {shards[0]}, {shards[1]}$"):
        Source(str(folder))


# The network


def ends(network, tied: bool) -> dict[str, torch.nn.Module]:
    """Embedding and head by the names of their weights in the file."""
    layers = {"model.embed_tokens.weight": network.get_input_embeddings()}
    return layers | {"model.embed_tokens.weight" if tied else "lm_head.weight": network.get_output_embeddings()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_network_from_a_source_holds_its_weights(family, tied, source_folder):
    source = Source(str(source_folder(family, tied)))
    network = build(source.config, source, "eager")
    expected = AutoModelForCausalLM.from_pretrained(source.folder).state_dict()
    assert network.state_dict().keys() == expected.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    assert network.training


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("added", [1, 3])
def test_added_rows_hold_the_mean_and_tied_embeddings_stay_tied(tied, added, source_folder):
    source = Source(str(source_folder(tied=tied)))
    config = source.config
    config.vocab_size = 300 + added
    network = build(config, source, "eager")
    for name, layer in ends(network, tied).items():
        assert torch.equal(layer.weight[:300], source.read(name))
        for row in layer.weight[300:]:
            assert torch.allclose(row, source.read(name).mean(0), atol=1e-7)
        assert layer.weight.shape[0] == 300 + added
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    assert network.config.vocab_size == 300 + added


@pytest.mark.parametrize("tied", [False, True])
def test_without_a_source_weights_are_random_and_without_data_on_meta(tied, source_folder):
    source = Source(str(source_folder(tied=tied)))
    one, two = build(source.config, None, "eager"), build(source.config, None, "eager")
    name = "model.layers.0.mlp.up_proj.weight"
    drawn = one.state_dict()[name]
    assert drawn.std().item() == pytest.approx(source.config.initializer_range, rel=0.1)
    assert not torch.equal(drawn, two.state_dict()[name])
    assert not torch.equal(drawn, source.read(name))
    empty = build(source.config, source, "eager", meta=True)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.state_dict().keys() == one.state_dict().keys()


def test_dropout_is_off(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_dropout": 0.5}))
    source = Source(str(folder))
    ids_BL = torch.arange(24)[None]

    def differs(network) -> bool:
        network.train()
        return not torch.equal(network(ids_BL).logits, network(ids_BL).logits)

    with torch.no_grad():
        assert differs(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
        assert not differs(build(source.config, source, "eager"))
        assert not differs(build(source.config, None, "eager"))


@pytest.mark.parametrize(("values", "kind"), [({}, "none"), ({"model_type": "qwen33"}, "qwen33")])
def test_an_unknown_model_type_is_named(values, kind):
    with pytest.raises(ValueError, match=f"model.config: model_type {kind} is not one that transformers knows"):
        build_config(values)


def test_build_config_takes_its_keys():
    assert build_config({"model_type": "qwen3", "hidden_size": 48}).hidden_size == 48


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_weights_are_float32_whatever_the_source_is_stored_in(meta, pretrained, source_folder, tmp_path):
    """A source in bfloat16 would otherwise train in bfloat16 under FSDP2, and in float32 on one device."""
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(source_folder("qwen3"), dtype=torch.bfloat16).save_pretrained(folder)
    source = Source(str(folder))
    network = build(source.config, source if pretrained else None, "eager", meta=meta)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("t5", "t5 is an encoder-decoder model; only decoder-only models convert"),
        ("gemma3", "gemma3 has other parts beside its language model; give the text model alone"),
        ("mamba", "mamba has linear_attention layers, which no attention mask reaches"),
        ("jamba", "jamba has linear_attention layers"),
        ("llama4_text", "llama4_text has chunked_attention layers"),
        ("rwkv", r"rwkv has no attention \(a state-space or recurrent model\), so no mask reaches it"),
        ("bloom", "bloom has no causal model that uses transformers' attention interface"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(model_type, says):
    with pytest.raises(ValueError, match=says):
        build(build_config({"model_type": model_type}), None, "eager", meta=True)


@pytest.mark.parametrize("init", ["mean", "random", 7])
@pytest.mark.parametrize("rows, mask_id", [(301, 300), (300, 299)], ids=["added", "free"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_mask_row_starts_from_what_was_asked_for(tied, rows, mask_id, init, source_folder):
    source = Source(str(source_folder(tied=tied)))
    config = source.config
    config.vocab_size = rows
    network = build(config, source, "eager", mask_row=(mask_id, init))
    for name, layer in ends(network, tied).items():
        table = source.read(name)
        row, others = layer.weight[mask_id], [n for n in range(300) if n != mask_id]
        assert torch.equal(layer.weight[others], table[others])
        if init == "random":
            assert (row - table.mean(0)).std().item() == pytest.approx(table.std().item(), rel=0.5)
            assert torch.equal(row, build(source.config, source, "eager", mask_row=(7, "random")).state_dict()[name][7])
        else:
            assert torch.allclose(row, table.mean(0) if init == "mean" else table[7], atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
def test_layers_are_found_whatever_the_family_calls_them(family, source_folder):
    network = AutoModelForCausalLM.from_pretrained(source_folder(family))
    base = network.base_model
    assert decoder_layers(network) == list(base.h if family == "gpt2" else base.layers)
    network._no_split_modules = set()
    with pytest.raises(ValueError, match=f"{family} names no decoder layers"):
        decoder_layers(network)


# What a folder says


def test_a_tokenizer_with_more_tokens_than_rows_is_anothers(source_folder):
    """Its last tokens would train from the mean of all rows without a word."""
    with pytest.raises(ValueError, match=r"the tokenizer of .* has 300 tokens and its embedding 290 rows; they do not"):
        BlockCausal(source=str(source_folder(rows=290))).configure_model()


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model", "apache-2.0"),
        ("---\nlicense: other\n---\n", "other"),
        ("# A model without a header", None),
        ("---\ntags: [x]\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_readme_states(readme, licence, folder):
    if readme is not None:
        (folder / "README.md").write_text(readme)
    assert Source(str(folder)).licence == licence


@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(source_folder, tmp_path, tied):
    """Where transformers would go on with random numbers."""
    folder = shutil.copytree(source_folder("qwen3", tied), tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_norm.weight"
    for changed, says in (
        ({n: w for n, w in weights.items() if n != name}, rf"{folder} has no tensor {name}$"),
        (
            weights | {name: torch.zeros(5)},
            rf"{folder}: {name} has shape \[5\], and by its config.json it would be \[8\]",
        ),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        source = Source(str(folder))
        with pytest.raises(ValueError, match=says):
            build(source.config, source, "eager")
