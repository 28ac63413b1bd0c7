"""Does a recipe fit its GPU? Arithmetic from its YAML and the model's published sizes, not a measurement.

    python benchmarks/scaling.py          # the table of docs/scaling.md

Letters as there: h width, q and k query and key heads times their width, f feed-forward width.
"""

from __future__ import annotations

from dlm_lightning import catalog
from dlm_lightning.readout import AT_A_TIME

SIZES = {  # of the published config.json files: h, f, layers, query heads, key heads, tied embeddings; heads of 128
    "block_causal_qwen3_0_6b_24gb": (1024, 3072, 28, 16, 8, True),
    "complementary_mask_qwen3_1_7b_80gb": (2048, 6144, 28, 16, 8, True),
    "fast_dllm_v2_qwen2_5_1_5b": (1536, 8960, 28, 12, 2, True),
    "efficient_dlm_qwen3_4b": (2560, 9728, 36, 32, 8, True),
    "efficient_dlm_qwen3_8b_4_nodes": (4096, 12288, 36, 32, 8, False),
}
VOCABULARY, HEAD_DIM = 151936, 128
COLUMNS = ("states", "gathered", "layer inputs", "one layer", "head", "peak")


def parts(name: str) -> dict[str, float]:
    """Gigabytes per GPU of each part, by the formulas of docs/scaling.md, and the peak."""
    config = catalog.compose(catalog.find(name).path)
    data, trainer = config["data"]["init_args"], config["trainer"]
    gpus = trainer["devices"] * trainer.get("num_nodes", 1)
    h, f, layers, heads, key_heads, tied = SIZES[name]
    q, k = heads * HEAD_DIM, key_heads * HEAD_DIM
    layer, root = 2 * h * (q + k) + 3 * h * f, VOCABULARY * h * (1 if tied else 2)
    parameters = layers * layer + root
    copies = 3 if config["model"]["class_path"].endswith("ComplementaryMask") else 2
    row, batch = copies * data["row_length"], data["batch_size"]
    found = {
        "states": 16 * parameters / gpus if gpus > 1 else 18 * parameters,
        "gathered": 10 * (root + 2 * layer) if gpus > 1 else 0,
        "layer inputs": 4 * h * layers * row * batch,
        "one layer": 2 * (40 * h + 36 * (q + k) + 4 * k + 8 * f) * row * batch,
        "head": 6 * AT_A_TIME["cuda"] + 8 * VOCABULARY * h,
    }
    layer_or_head = max(found["one layer"], found["head"])
    found["peak"] = found["states"] + found["gathered"] + found["layer inputs"] + layer_or_head
    return {column: bytes_ / 1e9 for column, bytes_ in found.items()}


def table() -> str:
    """A row per recipe, in gigabytes (10⁹ bytes) per GPU."""
    lines = [f"| recipe | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in SIZES:
        gigabytes = parts(name)
        lines.append(f"| `{name}` | {' | '.join(f'{gigabytes[column]:.1f}' for column in COLUMNS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
