"""A damaged folder made whole again: what is kept, what is lost, and that the rest is not touched."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.build.accounts import read_accounts
from data_tools.corpus import ShardReader, open_corpus
from data_tools.format.index import index_path, open_index
from packing import contents, data_tools, photo_folder


@pytest.fixture
def packed(tmp_path):
    """Three shards of four photos."""
    data_tools("pack", photo_folder(tmp_path / "photos", 12), tmp_path / "packed", "--samples-per-shard", 4)
    return tmp_path / "packed"


def repair(folder, *words, code=0):
    assert main(["repair", str(folder), *words, "--workers", "1"]) == code


def samples(folder):
    corpus = open_corpus(folder)
    with ShardReader(corpus) as reader:
        found = [reader.read(*corpus.locate(position)) for position in range(corpus.num_samples)]
    return {sample.key: sample.members for sample in found}


def spans(tar):
    """(first byte, byte behind the last) of each sample."""
    offsets = open_index(index_path(tar)).offsets.astype(np.int64).tolist()
    return list(itertools.pairwise(offsets))


def damage(tar, change):
    data = bytearray(tar.read_bytes())
    change(data)
    tar.write_bytes(data)


def zero_the_third(tar):
    start, stop = spans(tar)[2]
    damage(tar, lambda data: data.__setitem__(slice(start, stop), bytes(stop - start)))


def cut_in_the_third(tar):
    start, stop = spans(tar)[2]
    tar.write_bytes(tar.read_bytes()[: (start + stop) // 2])


def turn_a_bit_of_the_third_picture(tar):
    start, _ = spans(tar)[2]
    damage(tar, lambda data: data.__setitem__(start + 700, data[start + 700] ^ 1))


def change_the_third_caption(tar):
    start, stop = spans(tar)[2]

    def change(data):
        at = data.index(b"caption of", start)
        data[at : at + 7] = b"CAPTION"
        at = data.index(b"caption of", start, stop)
        data[at : at + 7] = b"CAPTION"

    damage(tar, change)


@pytest.mark.parametrize(
    ("harm", "lost"),
    [
        (zero_the_third, {2}),
        (cut_in_the_third, {2, 3}),
        (turn_a_bit_of_the_third_picture, {2}),
        (change_the_third_caption, {2}),
        (lambda tar: tar.unlink(), {0, 1, 2, 3}),
        (lambda tar: tar.write_bytes(b"no tar at all" * 1000), {0, 1, 2, 3}),
    ],
)
def test_what_is_whole_stays_and_what_is_lost_is_listed(packed, harm, lost, capsys):
    before, files = samples(packed), contents(packed)
    tar = packed / "shard-000001.tar"
    corpus = open_corpus(tar)
    with ShardReader(corpus) as reader:
        gone = {reader.key(0, row) for row in lost}
    harm(tar)
    repair(packed)
    told = capsys.readouterr().out
    assert f"{len(lost)} samples are lost, {12 - len(lost)} stay" in told
    assert samples(packed) == {key: members for key, members in before.items() if key not in gone}
    rows = [row for row in read_accounts(packed) if row["error_class"] == "lost"]
    assert {row["key"] for row in rows} == gone
    assert all("lost with the shard" in row["error"] and row["captions"] for row in rows)
    after = contents(packed)
    for name in files:
        if name.startswith(("shard-000000", "shard-000002")):
            assert after[name] == files[name]
    assert "shard-000001.tar" not in after
    assert "damaged/shard-000001.idx" in after
    assert main(["verify", str(packed), "--decode", "1", "--workers", "1"]) == 0
    repair(packed)
    assert "repaired 0 shards and 0 indexes" in capsys.readouterr().out


def test_an_index_alone_is_written_anew(packed, capsys):
    before = contents(packed)
    (packed / "shard-000000.idx").write_bytes(b"damaged")
    (packed / "shard-000002.idx").unlink()
    repair(packed)
    assert "repaired 0 shards and 2 indexes" in capsys.readouterr().out
    assert contents(packed) == before


def test_a_dry_run_says_why_and_changes_nothing(packed, capsys):
    repair(packed, "--dry-run")
    assert "0 damaged shards" in capsys.readouterr().out
    zero_the_third(packed / "shard-000001.tar")
    before = contents(packed)
    repair(packed, "--dry-run", code=1)
    assert "shard-000001: its content is not the manifest's" in capsys.readouterr().out
    assert contents(packed) == before


def test_a_damaged_account_and_a_foreign_folder_are_refused(packed, tmp_path, capsys):
    (packed / "shard-000001.parquet").write_bytes(b"nothing")
    repair(packed, code=1)
    assert "cannot read the account" in capsys.readouterr().err
    repair(tmp_path / "photos", code=1)
    assert "expected a packed folder" in capsys.readouterr().err


def test_a_repaired_folder_is_deleted_from_and_repaired_again(packed, tmp_path):
    zero_the_third(packed / "shard-000001.tar")
    repair(packed)
    keys = sorted(samples(packed))
    (tmp_path / "ids.txt").write_text(f"{keys[-1]}\n")
    assert main(["delete", str(packed), "--ids", str(tmp_path / "ids.txt"), "--workers", "1"]) == 0
    cut_in_the_third(packed / "shard-000000.tar")
    repair(packed)
    assert len(samples(packed)) == 12 - 1 - 1 - 2
    names = [shard["name"] for shard in json.loads((packed / "manifest.json").read_bytes())["shards"]]
    assert sorted(names) == ["shard-000000-r1", "shard-000001-r1", "shard-000002-r1"]
    assert main(["verify", str(packed), "--workers", "1"]) == 0
