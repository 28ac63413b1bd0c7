"""Whether documents share rows changes neither loss nor gradients, and no more does padding; with the real network."""

import pytest
import torch

from dlm_lightning.data.rows import Document, pack
from dlm_lightning.noise import NELBO, Masked, Noise
from dlm_lightning.view import AUTOREGRESSIVE, Batch, Pattern, groups

SIZES = [(0, 6), (3, 5), (0, 2), (2, 9), (1, 3), (0, 11), (5, 2)]  # tokens that are shown, tokens that may be masked
LONGEST = 12
ARMS = {  # pattern, noisy copies, shift, weight of the AR loss, noise
    "full": (Pattern(None), 1, "next_token", 0.0, NELBO),
    "per document": (Pattern(None), 1, "none", 0.0, Noise("tilted", "inverse_t", "document")),
    "block-causal, AR": (Pattern(4, "clean", "causal"), 1, "none", 0.5, NELBO),
    "complementary": (Pattern(4, "clean"), 2, "next_token", 0.0, NELBO),
    "autoregressive": (AUTOREGRESSIVE, 0, "next_token", 1.0, NELBO),
}


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [
        Document(torch.randint(300, (shown + own,), generator=generator).tolist(), [False] * shown + [True] * own)
        for shown, own in SIZES
    ]


def batch(documents, length, together=True):
    """The documents as packing lays them out; noise is a function of document and place in it, whatever its row."""
    generator = torch.Generator().manual_seed(1)
    u, t = (torch.rand(len(documents), LONGEST, generator=generator) for _ in range(2))
    columns, number = [], -1
    for row in pack(documents, length, 7, False, together):
        ids, position, document, maskable = (torch.from_numpy(column) for column in row)
        u_L, t_L = torch.rand(length), 1 - torch.rand(length)  # of padding: any
        for i in range(length):
            if document[i] >= 0:
                number += bool(position[i] == 0)
                u_L[i], t_L[i] = u[number, position[i]], 1 - t[number, position[i]]
        columns.append((ids.long(), position.long(), document.long(), maskable, u_L, t_L, torch.tensor(0)))
    return Batch(*map(torch.stack, zip(*columns, strict=True)))


@pytest.fixture
def step(make_denoiser, loss_and_gradients):
    def run(arm, rows: Batch):
        pattern, copies, shift, ar_weight, noise = arm
        spans = [groups(rows.position_BL, rows.document_BL, size) for size in (pattern.block_size, None)]
        first = noise.draw(rows.u_BL, rows.t_BL, rows.maskable_BL, *spans)
        rest_BL = rows.maskable_BL & ~first.mask_BL
        masked = [first, Masked(rest_BL, rest_BL.float())][:copies]
        return loss_and_gradients(make_denoiser("qwen3", True, shift=shift), rows, masked, pattern, ar_weight)

    return run


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
def test_packed_or_apart_and_however_padded(arm, documents, step, assert_same):
    packed, apart, padded, wide = (
        batch(documents, LONGEST),
        batch(documents, LONGEST, together=False),
        batch(documents, LONGEST + 9, together=False),
        batch(documents, 3 * LONGEST),
    )
    assert len(packed.ids_BL) < len(apart.ids_BL) == len(padded.ids_BL) == len(SIZES)
    assert len(wide.ids_BL) < len(packed.ids_BL)
    expected = step(arm, apart)
    for rows in (packed, padded, wide):
        assert rows.maskable_BL.sum() == apart.maskable_BL.sum()
        assert_same(step(arm, rows), expected)
