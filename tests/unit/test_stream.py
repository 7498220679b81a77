"""The training stream in one process: identical batches, substitutes, accounts and errors."""

from __future__ import annotations

import json
import os
from itertools import islice

import numpy as np
import pytest
import torch

from data_tools.errors import UsageError, UserError
from data_tools.shards import Sample
from pretrain.stream.bad import BadSampleError, check_bad_ratio
from pretrain.stream.loader import TrainStream
from pretrain.stream.members import label, training_caption
from pretrain.stream.transform import ImageSettings
from stream_corpora import CONTEXT, characters, members, picture, write_corpus

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
    with TrainStream(corpus, **(SETTINGS | settings)) as stream:
        return list(islice(stream.iterate(first_step), steps))


def assert_same(ours, theirs):
    assert (ours.step, ours.epoch, ours.keys, ours.captions, ours.bad) == (
        theirs.step, theirs.epoch, theirs.keys, theirs.captions, theirs.bad
    )  # fmt: skip
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.texts, theirs.texts)
    assert np.array_equal(ours.ids, theirs.ids)


def assert_slices(ranks, whole):
    """The ranks' batches of one step, laid together, are the global batch."""
    assert torch.equal(torch.cat([batch.images for batch in ranks]), whole.images)
    assert torch.equal(torch.cat([batch.texts for batch in ranks]), whole.texts)
    assert np.array_equal(np.concatenate([batch.ids for batch in ranks]), whole.ids)
    assert [key for batch in ranks for key in batch.keys] == whole.keys
    assert [caption for batch in ranks for caption in batch.captions] == whole.captions
    assert [bad for batch in ranks for bad in batch.bad] == whole.bad


def test_a_batch_is_complete(corpus):
    batch = batches(corpus, steps=1)[0]
    assert (batch.images.shape, batch.images.dtype) == ((GLOBAL_BATCH, 3, 16, 16), torch.uint8)
    assert (batch.texts.shape, batch.texts.dtype) == ((GLOBAL_BATCH, CONTEXT), torch.int64)
    assert batch.labels is None
    assert batch.ids.dtype == np.uint64
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        assert caption in json.loads(members(int(key))["json"])["captions"]
    assert torch.equal(batch.texts, characters(batch.captions))
    assert batch.images.float().std() > 10  # real pictures, each another
    assert len({image.numpy().tobytes() for image in batch.images}) == GLOBAL_BATCH


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
    stream = TrainStream(corpus, **SETTINGS)
    assert stream.steps_per_epoch == 4
    assert stream.dropped == 70 - 64
    run = batches(corpus, steps=8)
    assert [batch.epoch for batch in run] == [0] * 4 + [1] * 4
    assert [batch.step for batch in run] == list(range(8))
    rows = [row for batch in run for row in zip(batch.keys, batch.captions, batch.images, strict=True)]
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
    assert torch.equal(pinned.images, batch.images + 1)
    assert torch.equal(pinned.texts, batch.texts + 1)
    assert pinned.labels is None
    assert (pinned.step, pinned.keys, pinned.captions) == (batch.step, batch.keys, batch.captions)


def test_loading_in_the_rank_keeps_its_thread_count(corpus):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    batches(corpus, steps=1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_labels(corpus):
    batch = batches(corpus, steps=1, target="label")[0]
    assert batch.labels.tolist() == [int(key) % 3 for key in batch.keys]
    assert batch.labels.dtype == torch.int64
    assert batch.texts is None
    assert batch.captions == []


def test_the_position_derives_from_the_step(corpus):
    position = TrainStream(corpus, **SETTINGS).position(6)
    assert (position.epoch, position.samples_in_epoch, position.samples_seen) == (1, 32, 96)
    assert (position.manifest_digest, position.seed, position.streams) == (corpus.digest, 3, 16)
    position.check_resumable(TrainStream(corpus, **SETTINGS).position(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch": 128}, "larger than the corpus"),
        ({"world_size": 3}, "not divisible by the world size"),
        ({"target": "captoin"}, "unknown target"),
    ],
)
def test_settings_that_do_not_fit_are_refused(corpus, settings, message):
    with pytest.raises(UserError, match=message):
        TrainStream(corpus, **(SETTINGS | settings))


def test_an_unknown_target_is_a_usage_error(corpus):
    with pytest.raises(UsageError):
        TrainStream(corpus, **(SETTINGS | {"target": "x"}))


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
                assert torch.equal(replaced.images[row], clean.images[row])


def test_bad_samples_are_counted_and_quarantined(damaged, tmp_path):
    path = tmp_path / "run" / "quarantine-0.jsonl"
    with TrainStream(damaged, **SETTINGS, quarantine=path) as stream:
        run = list(islice(stream.iterate(0), 8))
        bad = [sample for batch in run for sample in batch.bad]
        assert (stream.read_total, stream.bad_total) == (8 * GLOBAL_BATCH, len(bad))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(bad) > 8
    assert [line["key"] for line in lines] == [sample.key for sample in bad]
    assert set(lines[0]) == {"step", "epoch", "shard", "index", "key", "kind", "error"}
    assert {line["step"] for line in lines} == {batch.step for batch in run if batch.bad}
    assert all(os.path.isfile(line["shard"]) for line in lines)


def test_too_many_bad_samples_stop_the_run_with_the_worst_shards(damaged):
    with TrainStream(damaged, **SETTINGS, max_bad_ratio=0.05) as stream:
        list(islice(stream.iterate(0), 8))
        with pytest.raises(UserError, match=r"too many bad samples, most in .*s-000001\.tar \(\d+\).*at most 0.05"):
            stream.check_bad_ratio()
        stream.check_bad_ratio(bad=5, read=1000)  # the counts of all ranks decide


def test_one_early_bad_sample_does_not_stop_a_run(damaged):
    with TrainStream(damaged, **SETTINGS, max_bad_ratio=0.02) as stream:
        stream.check_bad_ratio(bad=1, read=16)
        with pytest.raises(UserError, match="got 2 of 16 samples"):
            stream.check_bad_ratio(bad=2, read=16)


def test_the_ratio_is_literal():
    check_bad_ratio(1, 100, 0.01)
    check_bad_ratio(0, 100, 0.0)
    with pytest.raises(UserError, match="got 2 of 100 samples"):
        check_bad_ratio(2, 100, 0.01)
    with pytest.raises(UserError, match=r"most in b \(9\), c \(2\), a \(1\);"):
        check_bad_ratio(12, 100, 0.01, {"a": 1, "b": 9, "c": 2})


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
    with TrainStream(corpus, **SETTINGS) as stream:
        (tmp_path / "s-000001.tar").unlink()
        with pytest.raises(UserError, match=r"missing shard .*s-000001\.tar"):
            list(islice(stream.iterate(0), 4))
        assert stream.bad_total == 0


def test_an_unreadable_shard_is_named_and_never_replaced(corpus, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with TrainStream(corpus, **SETTINGS) as stream:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(UserError, match=r"cannot read shard .*\.tar; got Input/output error"):
            next(stream.iterate(0))


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        ({"jpg": None}, "caption", r"has no image \(jpg, .*got members cls, json, txt"),
        ({"txt": None, "json": None}, "caption", r"has no caption \(json, txt\); got members cls, jpg"),
        ({"cls": None}, "label", r"has no label \(cls\); got members jpg, json, txt"),
    ],
)
def test_a_corpus_of_another_kind_fails_at_once(tmp_path, change, target, message):
    corpus = write_corpus(tmp_path, [20], {0: change})
    with pytest.raises(UserError, match=message):
        TrainStream(corpus, **(SETTINGS | {"target": target}))


def test_a_text_is_one_caption_where_the_json_has_none():
    sample = Sample("k", 1, {"txt": b"two\nlines ", "json": b'{"width": 3}'})
    assert training_caption(sample, 0, 0) == "two\nlines"


def test_captions_are_chosen_evenly():
    choices = [training_caption(Sample("k", n, members(7)), 0, 0) for n in range(3000)]
    assert all(900 < choices.count(caption) < 1100 for caption in set(choices))
    assert len(set(choices)) == 3


@pytest.mark.parametrize(("cls", "kind"), [(b"x", "bad_label"), (b"-1", "bad_label"), (b"3", "bad_label")])
def test_labels_are_checked(cls, kind):
    with pytest.raises(BadSampleError) as caught:
        label(Sample("k", 1, {"cls": cls}), num_classes=3)
    assert caught.value.kind == kind


def test_a_closed_stream_can_be_used_again(corpus):
    stream = TrainStream(corpus, **SETTINGS)
    first = stream.iterate(0)
    keys = next(first).keys
    second = stream.iterate(0)
    assert next(second).keys == keys
    assert list(first) == []  # one iterator at a time
    stream.close()
    assert list(second) == []


def test_open_files_stay_flat(corpus):
    stream = TrainStream(corpus, **SETTINGS)
    list(islice(stream.iterate(0), 2))
    stream.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        next(stream.iterate(0))
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before
