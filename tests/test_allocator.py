"""What malloc holds: blocks that are alive, and gaps that nothing fits into again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlm_lightning.allocator import Allocator

MIB = 1 << 20


@pytest.fixture
def allocator():
    allocator = Allocator()
    if allocator._libc is None:
        pytest.skip("the C library is not glibc")
    yield allocator
    allocator.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_blocks_take_addresses_but_no_memory(allocator):
    before = resident()
    for key in range(20):
        allocator.take(key, 64 * MIB)
    assert 1280 * MIB <= allocator.most < 1290 * MIB
    assert resident() - before < 10 * MIB


def test_what_is_given_back_is_the_systems_again_if_large(allocator):
    for key in range(20):
        allocator.take(key, 64 * MIB)
        allocator.give_back(key)
    assert allocator.most < 65 * MIB


def test_a_gap_that_is_too_small_is_kept_and_counted(allocator):
    allocator.take(0, 24 * MIB)
    allocator.give_back(0)  # from now on, blocks of this size come from the heap
    for key in range(1, 41):
        allocator.take(key, 8 * MIB)
    for key in range(1, 40, 2):
        allocator.give_back(key)  # 160 MiB, in pieces
    for key in range(41, 49):
        allocator.take(key, 20 * MIB)  # as much again, and none of it fits
    assert allocator.most > 1.1 * 320 * MIB


def test_all_is_given_back_at_the_end_and_only_once(allocator):
    first = allocator._held()
    for key in range(20):
        allocator.take(key, 64 * MIB)
    allocator.close()
    assert allocator._held() <= first + MIB
    allocator.give_back(3)
