"""The join of hashes finds what comparing all with all finds, each pair once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_tools.dedup import near
from data_tools.dedup.choose import choose
from data_tools.hashing.perceptual import MIRROR


def drawn(seed, count, copies, radius, centres=None):
    """Hashes, and as many more at up to `radius` + 2 bits from some, half of them mirrored."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    copied = hashes[rng.integers(0, centres or count, copies)].copy()
    for number in range(copies):
        for bit in rng.choice(64, rng.integers(0, radius + 3), replace=False):
            copied[number] ^= np.uint64(1) << np.uint64(bit)
        if rng.random() < 0.5:
            copied[number] ^= np.uint64(MIRROR)
    return rng.permutation(np.unique(near.either(np.concatenate([hashes, copied]))))


def compared(hashes, radius):
    """All pairs by comparing all with all."""
    pairs = set()
    for number in range(len(hashes) - 1):
        close = np.flatnonzero(near.distance(hashes[number + 1 :], hashes[number]) <= radius)
        pairs |= {frozenset((int(hashes[number]), int(hashes[number + 1 + other]))) for other in close}
    return pairs


def joined(hashes, plan, folder, workers=1):
    hashes.tofile(folder / "hashes")
    found = [*near.near_pairs(folder / "hashes", plan, workers)]
    return [frozenset(map(int, pair)) for pairs in found for pair in pairs]


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("part_bits", [0, 2])
def test_all_pairs_are_found_once(radius, part_bits, tmp_path):
    hashes = drawn(radius, 2000, 2000, radius)
    plan = replace(near.make_plan(len(hashes), radius, hashes), part_bits=part_bits)
    found = joined(hashes, plan, tmp_path)
    assert len(found) == len(set(found))
    assert set(found) == compared(hashes, radius)
    assert found or not radius


def test_hashes_crowded_around_few_centres_are_joined_too(tmp_path, monkeypatch):
    monkeypatch.setattr(near, "_CHUNK", 64)  # so that runs of one key go over its edge
    hashes = drawn(1, 50, 1500, 4, centres=3)
    found = joined(hashes, near.make_plan(len(hashes), 4, hashes), tmp_path)
    assert len(found) == len(set(found)) > 10_000
    assert set(found) == compared(hashes, 4)


def test_workers_find_the_same(tmp_path):
    hashes = drawn(2, 3000, 1000, 3)
    plan = replace(near.make_plan(len(hashes), 3, hashes), part_bits=2)
    assert set(joined(hashes, plan, tmp_path, 2)) == set(joined(hashes, plan, tmp_path))


def test_more_hashes_are_cut_into_more_tables():
    sample = drawn(3, 1000, 0, 0)
    plans = [near.make_plan(count, 3, sample) for count in (10**4, 10**8, 10**10)]
    assert [plan.blocks for plan in plans] == sorted({plan.blocks for plan in plans})
    assert plans[1].seconds > 1000 * plans[0].seconds


def test_the_form_is_one_for_a_picture_and_its_mirror_image():
    hashes = drawn(4, 500, 0, 0)
    assert np.array_equal(near.either(hashes), near.either(hashes ^ np.uint64(MIRROR)))
    assert np.array_equal(near.either(near.either(hashes)), near.either(hashes))
    assert (near.distance(hashes, hashes ^ np.uint64(MIRROR)) == 0).all()


def one_after_the_other(better, worse, count):
    """What `choose` promises, from its definition."""
    fate = [-1] * count
    for node in range(count):
        stay = [b for b, w in zip(better, worse, strict=True) if w == node and fate[b] == -1]
        fate[node] = min(stay, default=-1)
    return fate


def test_the_choice_is_that_of_one_after_the_other():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 30))
        pairs = np.sort(rng.integers(0, count, (int(rng.integers(0, 80)), 2)), axis=1)
        better, worse = pairs[pairs[:, 0] != pairs[:, 1]].T
        assert choose(better, worse, count).tolist() == one_after_the_other(better, worse, count)


def test_a_chain_keeps_every_other_one():
    nodes = np.arange(100)
    assert choose(nodes[:-1], nodes[1:], 100).tolist() == [-1 if node % 2 == 0 else node - 1 for node in range(100)]
