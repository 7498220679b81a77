"""What goes, what stays for it, and how it is told."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.columns.column import column_path
from data_tools.corpus import open_corpus
from data_tools.dedup import command
from data_tools.format.manifest import read_manifest
from data_tools.format.writer import write_shard
from packing import contents, encoded


def scenery(seed: int, side: int = 96) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


ONE, TWO, THREE = encoded(scenery(1), "PNG"), encoded(scenery(2), "PNG"), encoded(scenery(3), "PNG")
SMALL_ONE = encoded(scenery(1).resize((64, 64)), "PNG")
MIRRORED_TWO = encoded(scenery(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT), quality=90)
RED = encoded(Image.new("RGB", (50, 50), "red"), "PNG")


@pytest.fixture
def corpus(tmp_path):
    """Two shards: a copy in fewer pixels, one with a longer caption, one of the same bytes, one of one colour."""
    first = {
        "a": {"png": SMALL_ONE, "txt": b"a caption longer than any"},
        "b": {"png": TWO, "txt": b"short"},
        "c": {"png": THREE, "txt": b"three"},
        "d": {"png": RED, "txt": b"red"},
        "e": {"png": b"broken", "txt": b"broken"},
    }
    second = {
        "a": {"png": ONE, "txt": b"one"},
        "b": {"jpg": MIRRORED_TWO, "txt": b"the longer caption"},
        "c": {"png": THREE, "txt": b"three"},
        "d": {"png": RED, "txt": b"red"},
        "e": {"png": b"broken", "txt": b"broken"},
        "f": {"txt": b"no picture"},
        "g": {"txt": b"no picture"},
    }
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards/one.tar", first.items())
    write_shard(tmp_path / "shards/two.tar", second.items())
    assert main(["hash", str(tmp_path / "shards"), "--workers", "1"]) == 0
    return tmp_path / "shards"


def dedup(folder, *options):
    return main(["dedup", str(folder), "--workers", "1", *map(str, options)])


GOES = {("one", "a"), ("one", "b"), ("two", "c"), ("two", "d"), ("two", "e")}


def test_the_best_copy_stays(corpus, capsys):
    """Of more pixels, of one size that of the longer caption, else the first; what has no picture is no copy."""
    assert dedup(corpus) == 0
    assert "12 samples: 3 of the same bytes and 2 alike go, 7 stay" in capsys.readouterr().out
    found = open_corpus(corpus)
    hashes = [found.tar_hash(shard).hex() for shard in range(2)]
    for name, keys in (("one", "abcde"), ("two", "abcdefg")):
        rows = pq.read_table(column_path(corpus / f"{name}.tar", "dedup")).to_pylist()
        goes = {(name, key) for key, row in zip(keys, rows, strict=True) if row["sample_weight"] == 0}
        assert goes == {one for one in GOES if one[0] == name}
        for row in rows:
            assert (row["kept_shard"] is None) == (row["sample_weight"] == 1)
    one = pq.read_table(column_path(corpus / "one.tar", "dedup")).to_pylist()
    assert [(row["kept_shard"], row["kept_row"], row["same_bytes"]) for row in one[:2]] == [
        (hashes[1], 0, False),
        (hashes[1], 1, False),
    ]
    assert all(row["distance"] <= 8 for row in one[:2])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_list_names_both(corpus, suffix):
    path = corpus.parent / f"copies.{suffix}"
    assert dedup(corpus, "--output", path, "--dry-run") == 0
    text = path.read_text()
    rows = list(csv.DictReader(text.splitlines())) if suffix == "csv" else [json.loads(x) for x in text.splitlines()]
    assert {(row["shard"].rsplit("/", 1)[1][:3], row["key"]) for row in rows} == GOES
    assert {row["kept_key"] for row in rows if row["key"] == "c"} == {"c"}
    assert not list(corpus.glob("*.dedup.parquet"))


def test_a_radius_of_none_takes_what_looks_the_same_alone(corpus, capsys):
    assert dedup(corpus, "--radius", 0, "--dry-run") == 0
    assert "3 of the same bytes" in capsys.readouterr().out


def test_the_same_again_gives_the_same_bytes(corpus):
    dedup(corpus)
    whole = contents(corpus)
    dedup(corpus)
    assert contents(corpus) == whole


def test_without_hashes_it_says_what_to_run(tmp_path, capsys):
    write_shard(tmp_path / "own.tar", [("a", {"png": ONE})])
    assert dedup(tmp_path / "own.tar") == 1
    assert "remedy: run `python -m data_tools hash`" in capsys.readouterr().err


def test_a_corpus_without_any_hash_is_searched_too(tmp_path, capsys):
    write_shard(tmp_path / "own.tar", [(key, {"txt": b"text"}) for key in "ab"])
    main(["hash", str(tmp_path / "own.tar")])
    assert dedup(tmp_path / "own.tar") == 0
    assert "2 stay" in capsys.readouterr().out


def test_a_long_search_is_begun_on_request_alone(corpus, monkeypatch, capsys):
    monkeypatch.setattr(command, "_PATIENCE", 0.0)
    assert dedup(corpus) == 1
    said = capsys.readouterr().err
    assert "pairs to compare" in said
    assert "--yes" in said
    assert dedup(corpus, "--yes") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--radius", 16], "--radius is out of range"),
        (["--radius", -1], "--radius is out of range"),
        (["--output", "copies.txt"], "another suffix"),
        (["--output", "/nowhere/copies.csv"], "no folder"),
        (["--workers", 0], "--workers is too small"),
    ],
)
def test_wrong_options(corpus, options, said, capsys):
    assert main(["dedup", str(corpus), *map(str, options)]) == 2
    assert said in capsys.readouterr().err


def test_the_manifest_tells_of_it(tmp_path, photo_shards):
    assert dedup(photo_shards) == 0
    assert set(read_manifest(photo_shards / "manifest.json").columns) == {"hash", "dedup"}


@pytest.fixture
def photo_shards(tmp_path):
    from packing import data_tools, photo_folder

    photo_folder(tmp_path / "photos", 6)
    data_tools("pack", tmp_path / "photos", tmp_path / "packed", "--samples-per-shard", 4)
    data_tools("hash", tmp_path / "packed")
    return tmp_path / "packed"
