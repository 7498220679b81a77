"""The training stream in one process: identical batches, substitutes, accounts and errors."""

from __future__ import annotations

import json
import os
from itertools import islice

import numpy as np
import pytest
import torch

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from pretrain.stream.bad import BadSample, BadSampleAccount, bad_ratio_error, too_many_bad
from pretrain.stream.transform import ImageSettings
from stream_corpora import CONTEXT, characters, classes, members, picture, pixels, stream_of, tokens, write_corpus

GLOBAL_BATCH = 16
SETTINGS = {
    "seed": 3,
    "global_batch": GLOBAL_BATCH,
    "window": 4,
    "image": ImageSettings(16, crop_scale=(0.5, 1.0)),
    "tokenize": characters,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("shards"), [23, 31, 16])


def batches(corpus, first_step=0, steps=9, **settings):
    with stream_of(corpus, **(SETTINGS | settings)) as stream:
        return list(islice(stream.iterate(first_step), steps))


def assert_same(ours, theirs):
    assert (ours.step, ours.epoch, ours.keys, ours.captions, ours.bad) == (
        theirs.step, theirs.epoch, theirs.keys, theirs.captions, theirs.bad
    )  # fmt: skip
    assert torch.equal(pixels(ours), pixels(theirs))
    assert torch.equal(tokens(ours), tokens(theirs))
    assert np.array_equal(ours.ids, theirs.ids)


def assert_slices(ranks, whole):
    """The ranks' batches of one step, laid together, are the global batch."""
    assert torch.equal(torch.cat([pixels(batch) for batch in ranks]), pixels(whole))
    assert torch.equal(torch.cat([tokens(batch) for batch in ranks]), tokens(whole))
    assert np.array_equal(np.concatenate([batch.ids for batch in ranks]), whole.ids)
    assert [key for batch in ranks for key in batch.keys] == whole.keys
    assert [caption for batch in ranks for caption in batch.captions] == whole.captions
    assert [bad for batch in ranks for bad in batch.bad] == whole.bad


def test_a_batch_is_complete(corpus):
    batch = batches(corpus, steps=1)[0]
    assert (pixels(batch).shape, pixels(batch).dtype) == (
        (GLOBAL_BATCH, 3, 16, 16),
        torch.uint8,
    )
    assert (tokens(batch).shape, tokens(batch).dtype) == (
        (GLOBAL_BATCH, CONTEXT),
        torch.int64,
    )
    assert set(batch.inputs) == {"text", "image"}
    assert batch.ids.dtype == np.uint64
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        assert caption in json.loads(members(int(key))["json"])["captions"]
    assert torch.equal(tokens(batch), characters(batch.captions))
    assert pixels(batch).float().std() > 10  # real pictures, each another
    assert len({image.numpy().tobytes() for image in pixels(batch)}) == GLOBAL_BATCH


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_hold_the_slices_of_the_same_global_batch(corpus, world_size):
    whole = batches(corpus)
    ranks = [batches(corpus, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert_slices([rank[step] for rank in ranks], batch)


@pytest.mark.parametrize("first_step", [1, 3, 4, 6])
def test_a_resumed_stream_goes_on_with_the_same_batches(corpus, first_step):
    whole = batches(corpus)
    for ours, theirs in zip(batches(corpus, first_step, steps=9 - first_step), whole[first_step:], strict=True):
        assert_same(ours, theirs)


def test_epochs_follow_each_other_and_augment_anew(corpus):
    stream = stream_of(corpus, **SETTINGS)
    assert stream.steps_per_epoch == 4
    assert stream.mixture.dropped == 70 - 64
    run = batches(corpus, steps=8)
    assert [batch.epoch for batch in run] == [0] * 4 + [1] * 4
    assert [batch.step for batch in run] == list(range(8))
    rows = [row for batch in run for row in zip(batch.keys, batch.captions, pixels(batch), strict=True)]
    first = {key: (caption, image) for key, caption, image in rows[:64]}
    assert len(first) == 64
    again = [(first[key], caption, image) for key, caption, image in rows[64:] if key in first]
    assert sum(before[0] != caption for before, caption, _ in again) > len(again) / 3  # of three captions
    assert sum(not torch.equal(before[1], image) for before, _, image in again) > len(again) * 0.9


def test_another_seed_gives_other_batches(corpus):
    assert batches(corpus, steps=1)[0].keys != batches(corpus, steps=1, seed=4)[0].keys


def test_the_global_random_state_is_left_alone(corpus):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(corpus, steps=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_pinning_keeps_everything_else(corpus, monkeypatch):
    batch = batches(corpus, steps=1)[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    pinned = batch.pin_memory()
    assert torch.equal(pixels(pinned), pixels(batch) + 1)
    assert torch.equal(tokens(pinned), tokens(batch) + 1)
    assert torch.equal(pinned.identity["image"], batch.identity["image"] + 1)
    assert (pinned.step, pinned.keys, pinned.captions) == (batch.step, batch.keys, batch.captions)


def test_loading_in_the_rank_keeps_its_thread_count(corpus):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    batches(corpus, steps=1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_labels(corpus):
    batch = batches(corpus, steps=1, tokenize=None)[0]
    assert classes(batch).tolist() == [int(key) % 3 for key in batch.keys]
    assert classes(batch).dtype == torch.int64
    assert set(batch.inputs) == {"label", "image"}
    assert batch.captions == []


def test_the_position_derives_from_the_step(corpus):
    position = stream_of(corpus, **SETTINGS).position(6)
    assert (position.step, position.samples_seen, position.sources) == (6, 96, ((1, 32),))
    assert (position.manifest_digest, position.seed, position.streams) == (corpus.digest, 3, 16)
    position.check_resumable(stream_of(corpus, **SETTINGS).position(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch": 128}, "larger than the corpus"),
        ({"world_size": 3}, "not divisible by the world size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(corpus, settings, message):
    with pytest.raises(UserError, match=message):
        stream_of(corpus, **(SETTINGS | settings))


BAD = {
    5: ({"jpg": b"not a picture"}, "undecodable"),
    17: ({"jpg": picture(17)[:150]}, "undecodable"),
    29: ({"txt": b" ", "json": b"{}"}, "no_caption"),
    30: ({"txt": None, "json": None}, "no_caption"),
    44: ({"json": b"{"}, "bad_json"),
    45: ({"json": b'{"captions": [3]}'}, "bad_json"),
    58: ({"jpg": None}, "no_image"),
    61: ({"txt": b"\xff\xfe", "json": None}, "bad_text"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("damaged"), [23, 31, 16], {n: change for n, (change, _) in BAD.items()})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bad_samples_are_replaced_alike_at_every_world_size(damaged, world_size):
    whole = batches(damaged, steps=8)
    ranks = [batches(damaged, steps=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert_slices([rank[step] for rank in ranks], batch)
        assert not {int(key) for key in batch.keys} & set(BAD)
    found = {int(bad.key): bad.kind for batch in whole for bad in batch.bad}
    assert found == {n: kind for n, (_, kind) in BAD.items() if n in found}
    assert len(found) >= len(BAD) - 2  # the tails of two epochs may hold a few


def test_only_the_bad_samples_change(corpus, damaged):
    for clean, replaced in zip(batches(corpus), batches(damaged), strict=True):
        for row, key in enumerate(clean.keys):
            if int(key) in BAD:
                assert replaced.keys[row] != key
            else:
                assert replaced.keys[row] == key
                assert torch.equal(pixels(replaced)[row], pixels(clean)[row])


def test_bad_samples_are_counted_and_quarantined(damaged, tmp_path):
    path = tmp_path / "run" / "quarantine-0.jsonl"
    with stream_of(damaged, **SETTINGS, quarantine=path) as stream:
        run = list(islice(stream.iterate(0), 8))
        bad = [sample for batch in run for sample in batch.bad]
        assert (stream.account.read_total, stream.account.bad_total) == (8 * GLOBAL_BATCH, len(bad))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(bad) > 8
    assert [line["key"] for line in lines] == [sample.key for sample in bad]
    assert set(lines[0]) == {"step", "epoch", "shard", "index", "key", "kind", "error"}
    assert {line["step"] for line in lines} == {batch.step + 1 for batch in run if batch.bad}
    assert all(os.path.isfile(line["shard"]) for line in lines)


def test_one_early_bad_sample_is_not_too_many(damaged):
    with stream_of(damaged, **SETTINGS, max_bad_ratio=0.02) as stream:
        assert not stream.too_many_bad(1, 16)
        assert stream.too_many_bad(2, 16)


def test_the_ratio_is_literal():
    assert not too_many_bad(1, 100, 0.01)
    assert not too_many_bad(0, 100, 0.0)
    assert too_many_bad(2, 100, 0.01)
    message = str(bad_ratio_error(12, 100, 0.01, {"a": 1, "b": 9, "c": 2}))
    assert "most in b (9), c (2), a (1); got 12 of 100 samples; expected at most 0.01" in message


def test_an_account_settles_every_step_once():
    account = BadSampleAccount()
    bad = [BadSample("s.tar", 3, "k", kind, "") for kind in ("damaged", "no_image")]
    for step, found in enumerate(([], bad, bad[:1])):
        account.add(step, 8, found)
    first, second = account.pop_counts(2), account.pop_counts(3)
    assert (first.given, first.by_kind, first.by_shard) == (16, {"damaged": 1, "no_image": 1}, {"s.tar": 2})
    assert (second.given, second.by_kind) == (8, {"damaged": 1})
    assert account.pop_counts(3).given == 0


def test_a_later_shard_of_another_kind_fails_at_once_with_its_keys(tmp_path):
    corpus = write_corpus(tmp_path, [20, 20], {n: {"jpg": None, "avif": b"x"} for n in range(20, 40)})
    with pytest.raises(UserError, match=r"no sample of .*s-000001\.tar has the expected image .*got members avif, cls"):
        batches(corpus, steps=2)
    write_corpus(tmp_path, [20, 20], {n: {"txt": None, "json": b'{"alt": "a", "url": 3}'} for n in range(20, 40)})
    with pytest.raises(UserError, match=r"the expected caption \(json:captions, txt\).*fields of its json alt, url"):
        batches(open_corpus([tmp_path / "s-000000.tar", tmp_path / "s-000001.tar"]), steps=2)
    small = write_corpus(tmp_path, [20, 20, 1], {40: {"txt": None, "json": None}})  # too few to tell: a bad sample
    assert {bad.kind for batch in batches(small, steps=8, global_batch=8) for bad in batch.bad} == {"no_caption"}


def test_nothing_readable_ends_with_an_error(tmp_path):
    corpus = write_corpus(tmp_path, [20], {n: {"jpg": b"x"} for n in range(20)})
    with pytest.raises(UserError, match="no readable sample found in place of"):
        batches(corpus, steps=1)


def test_damage_inside_a_tar_is_a_bad_sample(tmp_path):
    corpus = write_corpus(tmp_path, [40])
    tar = tmp_path / "s-000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"000007.cls")
    data[at : at + 512] = bytes(512)
    tar.write_bytes(data)
    kinds = {(bad.index, bad.kind) for batch in batches(corpus, steps=4) for bad in batch.bad}
    assert kinds == {(7, "damaged")}


def test_a_shard_that_vanishes_is_named_and_never_replaced(tmp_path):
    corpus = write_corpus(tmp_path, [23, 31, 16])
    with stream_of(corpus, **SETTINGS) as stream:
        (tmp_path / "s-000001.tar").unlink()
        with pytest.raises(UserError, match=r"missing shard .*s-000001\.tar"):
            list(islice(stream.iterate(0), 4))
        assert stream.account.bad_total == 0


def test_an_unreadable_shard_is_named_and_never_replaced(corpus, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with stream_of(corpus, **SETTINGS) as stream:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(UserError, match=r"cannot read shard .*\.tar; got Input/output error"):
            next(stream.iterate(0))


@pytest.mark.parametrize(
    ("change", "tokenize", "message"),
    [
        ({"jpg": None}, characters, r"has the expected image \(jpg, .*got members cls, json, txt"),
        (
            {"txt": None, "json": None},
            characters,
            r"the expected caption \(json:captions, txt\); got members cls, jpg",
        ),
        ({"cls": None}, None, r"has the expected label \(cls\); got members jpg, json, txt"),
    ],
)
def test_a_corpus_of_another_kind_fails_at_once(tmp_path, change, tokenize, message):
    corpus = write_corpus(tmp_path, [20], dict.fromkeys(range(20), change))
    with pytest.raises(UserError, match=message):
        stream_of(corpus, **(SETTINGS | {"tokenize": tokenize}))


def test_a_closed_stream_can_be_used_again(corpus):
    stream = stream_of(corpus, **SETTINGS)
    first = stream.iterate(0)
    keys = next(first).keys
    second = stream.iterate(0)
    assert next(second).keys == keys
    assert list(first) == []  # one iterator at a time
    stream.close()
    assert list(second) == []


def test_open_files_stay_flat(corpus):
    stream = stream_of(corpus, **SETTINGS)
    list(islice(stream.iterate(0), 2))
    stream.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        next(stream.iterate(0))
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_identity_is_that_of_bytes_and_of_tokens(tmp_path):
    """Samples of one picture share its hash under any key, and equal texts theirs."""
    change = {n: {"jpg": picture(n if n % 4 else 0), "txt": f"text {n // 2}".encode(), "json": None} for n in range(16)}
    (batch,) = batches(write_corpus(tmp_path, [16], change), steps=1)
    images, texts = batch.identity["image"].tolist(), batch.identity["text"].tolist()
    numbers = [int(key[-2:]) for key in batch.keys]
    same = lambda values: [[one == other for other in values] for one in values]  # noqa: E731
    assert same(images) == same([n if n % 4 else 0 for n in numbers])
    assert same(texts) == same([n // 2 for n in numbers])
