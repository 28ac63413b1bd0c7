"""Compiling the decoder layers, and whether a compiler is there before a run counts on it."""

from __future__ import annotations

import torch
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from dlm_lightning.source import decoder_layers

GRAPHS = 64  # that one layer may need, with and without gradients, for its shapes


def compile_layers(network: PreTrainedModel, device: torch.device) -> None:
    """Compile the decoder layers at their first call; one compilation serves them all. ValueError without a compiler.

    The last one's parts are compiled one by one, since its feed-forward part has fewer tokens (see `read_alone`).
    """
    check_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    *layers, last = decoder_layers(network)
    for module in (*layers, *last.children()):
        module.compile()


def check_compiler(device: torch.device) -> None:
    """ValueError if torch cannot compile for this device: it takes Triton on GPUs, a C++ compiler on CPUs."""
    if device.type == "cuda":
        if not has_triton():
            raise ValueError("model.compile: to compile for a GPU needs Triton, which is not installed")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "model.compile: to compile for a CPU needs a C++ compiler, as $CXX or g++, and none works here"
        ) from error
