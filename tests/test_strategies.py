"""Strategies without processes: an empty network filled from the source equals the one that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from transformers import AutoModelForCausalLM

from dlm_lightning.errors import sentence
from dlm_lightning.source import Source, build
from dlm_lightning.strategies import DDP, FSDP2, fill


def filled(source: Source, rows: int = 300, **options) -> nn.Module:
    """A network that was empty, and poisoned so that whatever is not filled shows."""
    config = source.config
    config.vocab_size = rows
    network = build(config, source, "eager", meta=True).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(torch.nan)
    fill(network, source, **options)
    return network


def everything(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that no file keeps."""
    return dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers())


@pytest.mark.parametrize("tied", [False, True])
def test_a_filled_network_equals_from_pretrained(family, tied, source_folder):
    folder = source_folder(family, tied)
    network, expected = filled(Source(str(folder))), AutoModelForCausalLM.from_pretrained(folder)
    assert any("inv_freq" in name for name in everything(expected)) == (family != "gpt2")
    assert everything(network).keys() == everything(expected).keys()
    for name, tensor in everything(expected).items():
        assert torch.equal(everything(network)[name], tensor), name
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    ids_BL = torch.arange(20)[None]
    expected.set_attn_implementation("eager")
    assert torch.equal(network(ids_BL).logits, expected(ids_BL).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_added_rows_are_those_of_build(tied, source_folder):
    source = Source(str(source_folder(tied=tied)))
    config = source.config
    config.vocab_size = 303
    expected = everything(build(config, source, "eager"))
    network = everything(filled(source, 303))
    assert network["lm_head.weight"].shape[0] == 303
    for name, tensor in expected.items():
        assert torch.equal(network[name], tensor), name


@pytest.mark.parametrize("init", ["mean", "random", 7])
@pytest.mark.parametrize("rows, mask_id", [(301, 300), (300, 299)], ids=["added", "free"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_mask_row_is_that_of_build(tied, rows, mask_id, init, source_folder):
    source = Source(str(source_folder(tied=tied)))
    config = source.config
    config.vocab_size = rows
    expected = everything(build(config, source, "eager", mask_row=(mask_id, init)))
    network = everything(filled(source, rows, mask_row=(mask_id, init)))
    assert all(torch.equal(network[name], tensor) for name, tensor in expected.items())


def test_a_sharded_source_fills_as_one_file_does(source_folder, tmp_path):
    folder = shutil.copytree(source_folder(), tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source_folder()).save_pretrained(Path(folder), max_shard_size="30KB")
    (folder / "model.safetensors").unlink()
    one, several = everything(filled(Source(str(source_folder())))), everything(filled(Source(str(folder))))
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_source_that_names_its_tensors_otherwise_is_refused_in_one_sentence(source_folder):
    """transformers fuses the experts, which the files keep one by one."""
    folder = source_folder("qwen3_moe")
    with pytest.raises(ValueError) as error:
        filled(Source(str(folder)))
    assert sentence(error.value) == f"model.source: {folder} has no tensor model.layers.0.mlp.experts.gate_up_proj"


def test_the_strategy_is_known_by_its_name():
    assert isinstance(StrategyRegistry.get("fsdp2"), FSDP2)


@pytest.mark.parametrize("name", ["ddp", "auto"])
def test_ddp_moves_no_batch_to_a_gpu(name, monkeypatch):
    strategy = L.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False).strategy
    assert type(strategy) is DDP
    monkeypatch.setattr(DDP, "root_device", torch.device("cuda", 1))
    assert strategy.determine_ddp_device_ids() is None
