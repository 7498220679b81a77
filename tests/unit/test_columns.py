"""Columns beside shards: what they hold, when they are made anew, and how a stale one is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_tools.columns import make
from data_tools.columns.column import column_path, read_column, read_footer
from data_tools.columns.make import make_column, open_local
from data_tools.errors import UsageError, UserError
from data_tools.format.index import index_path, open_index
from data_tools.format.manifest import read_manifest
from data_tools.format.writer import write_shard
from data_tools.hashing.maker import NAME, SCHEMA, HashMaker
from data_tools.hashing.perceptual import perceptual_hash
from data_tools.media.members import DEFAULT_FIELDS
from packing import contents, data_tools, jpeg, photo_folder

MAKER = HashMaker(DEFAULT_FIELDS)


@pytest.fixture
def shards(tmp_path):
    """Three of four photos each."""
    photo_folder(tmp_path / "photos", 12)
    data_tools("pack", tmp_path / "photos", tmp_path / "shards", "--samples-per-shard", 4)
    return tmp_path / "shards"


def made(folder, maker=MAKER, workers=1):
    return make_column(open_local([str(folder)]), maker, workers)


def read(tar, fields=tuple(SCHEMA.names)):
    index = open_index(index_path(tar))
    return read_column(tar, NAME, index.tar_hash, fields, index.key_hashes)


def tars(folder):
    return sorted(folder.glob("*.tar"))


def test_a_row_a_sample_in_the_order_of_the_tar(shards):
    report = made(shards)
    assert (report.shards, report.kept, report.samples, report.faults) == (3, 0, 12, {})
    for tar in tars(shards):
        account = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        rows = read(tar).to_pylist()
        assert [row["sha256"].hex() for row in rows] == [row["sha256"] for row in account]
        assert [(row["width"], row["height"]) for row in rows] == [(40, 30)] * 4
        assert [row["caption_length"] for row in rows] == [len(row["captions"][0]) for row in account]


def test_the_hashes_are_those_of_the_pictures(tmp_path):
    samples = {"a": {"jpg": jpeg(1), "txt": b"one"}, "b": {"jpg": jpeg(2)}, "c": {"txt": b"alone"}, "d": {"jpg": b"x"}}
    write_shard(tmp_path / "own.tar", samples.items())
    assert made(tmp_path / "own.tar").faults == {"no_image": 1, "undecodable": 1}
    rows = read(tmp_path / "own.tar", (*SCHEMA.names, "error")).to_pylist()
    assert [row["phash"] for row in rows] == [perceptual_hash(jpeg(1)), perceptual_hash(jpeg(2)), None, None]
    assert [row["sha256"] for row in rows] == [
        hashlib.sha256(data).digest() if data else None for data in (jpeg(1), jpeg(2), None, b"x")
    ]
    assert [row["caption_length"] for row in rows] == [3, 0, None, 0]
    assert [row["error"] for row in rows] == [None, None, "no_image", "undecodable"]


def test_what_a_damaged_tar_lost_has_a_row(tmp_path):
    write_shard(tmp_path / "own.tar", [(f"s{number}", {"jpg": jpeg(number)}) for number in range(5)])
    data = bytearray((tmp_path / "own.tar").read_bytes())
    index = open_index(index_path(tmp_path / "own.tar"))
    data[int(index.offsets[2]) : int(index.offsets[3])] = bytes(int(index.offsets[3] - index.offsets[2]))
    (tmp_path / "own.tar").write_bytes(data)
    assert made(tmp_path / "own.tar").faults == {make.LOST: 1}


def test_the_bytes_do_not_depend_on_workers_and_what_is_there_is_kept(shards):
    made(shards, workers=2)
    whole = contents(shards)
    assert (made(shards).kept, contents(shards)) == (3, whole)
    for tar in tars(shards)[:2]:
        column_path(tar, NAME).unlink()
    assert (made(shards).kept, contents(shards)) == (1, whole)


def test_another_rule_makes_it_anew(shards):
    made(shards)
    other = HashMaker(replace(DEFAULT_FIELDS, captions=("txt",)))
    assert made(shards, other).kept == 0
    assert read_footer(tars(shards)[0], NAME).made_by["captions"] == ["txt"]


def test_the_manifest_tells_of_a_whole_column_alone(shards):
    assert "columns" not in json.loads((shards / "manifest.json").read_bytes())
    made(tars(shards)[0])
    assert read_manifest(shards / "manifest.json").columns == {}
    made(shards)
    told = read_manifest(shards / "manifest.json").columns
    assert told[NAME]["made_by"] == json.loads(json.dumps(MAKER.made_by))
    made(tars(shards)[0], HashMaker(replace(DEFAULT_FIELDS, captions=("txt",))))  # now they differ
    assert read_manifest(shards / "manifest.json").columns == {}


def test_packing_again_keeps_what_the_manifest_tells(shards):
    made(shards)
    whole = contents(shards)
    data_tools("pack", shards.parent / "photos", shards, "--samples-per-shard", 4)
    assert contents(shards) == whole


def test_a_column_of_other_bytes_is_stale_and_made_anew(tmp_path):
    tar = tmp_path / "own.tar"
    write_shard(tar, [("a", {"jpg": jpeg(1)})])
    made(tar)
    write_shard(tar, [("a", {"jpg": jpeg(2)})])
    with pytest.raises(UserError, match=r"made of another shard; .*remedy: run `python -m data_tools hash`"):
        read(tar)
    assert made(tar).kept == 0
    assert read(tar)["phash"].to_pylist() == [perceptual_hash(jpeg(2))]


def test_a_missing_or_foreign_file_is_told(tmp_path):
    tar = tmp_path / "own.tar"
    write_shard(tar, [("a", {"jpg": jpeg(1)})])
    with pytest.raises(UserError, match="has no column hash"):
        read(tar)
    column_path(tar, NAME).write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot read the column"):
        read(tar)
    pq.write_table(pq.read_table(_account(tmp_path)), column_path(tar, NAME))
    with pytest.raises(UserError, match="cannot read the column"):
        read(tar)


def _account(folder: Path) -> Path:
    photo_folder(folder / "photos", 1)
    data_tools("pack", folder / "photos", folder / "packed")
    return folder / "packed/shard-000000.parquet"


def test_ids_are_compared(tmp_path):
    """The same bytes under another index cannot be; a column whose rows were exchanged can."""
    tar = tmp_path / "own.tar"
    write_shard(tar, [("a", {"jpg": jpeg(1)}), ("b", {"jpg": jpeg(2)})])
    made(tar)
    path = column_path(tar, NAME)
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0]), path)
    with pytest.raises(UserError, match="names other samples"):
        read(tar)


def test_remote_shards_are_refused():
    with pytest.raises(UsageError, match="copy the shards to this machine"):
        open_local(["s3://bucket/shards"])


def test_a_name_is_no_path(tmp_path):
    with pytest.raises(ValueError, match="no name of a column"):
        column_path(tmp_path / "own.tar", "../own")
