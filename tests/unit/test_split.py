"""Parts of a corpus: all samples in one each, copies together, the same after growing."""

from __future__ import annotations

import json

import pytest

from data_tools.__main__ import main
from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UsageError
from data_tools.format.writer import write_shard
from data_tools.rewrite.split import parse_shares
from packing import contents, jpeg

COUNT = 60


@pytest.fixture
def tars(tmp_path):
    """Two tars of 30; the pictures of the second are those of the first, and its keys others."""
    (tmp_path / "tars").mkdir()
    for tar in range(2):
        samples = {
            f"{tar}{number:03d}": {
                "jpg": jpeg(number),
                "txt": b"text",
                "json": json.dumps({"split": "val" if number % 5 == 0 else "train", "n": number}).encode(),
            }
            for number in range(COUNT // 2)
        }
        write_shard(tmp_path / f"tars/{tar}.tar", samples.items())
    return tmp_path / "tars"


def split(*words, code=0):
    assert main(["split", *map(str, words), "--workers", "1"]) == code


def keys(folder):
    corpus = open_corpus(folder)
    with ShardReader(corpus) as reader:
        return {reader.read(*corpus.locate(position)).key for position in range(corpus.num_samples)}


def test_every_sample_is_in_one_part_and_copies_are_together(tars, tmp_path, capsys):
    split(tars, tmp_path / "parts", "--shares", "train=0.7,val=0.3")
    told = capsys.readouterr().out
    assert "60 of 60 samples" in told
    train, val = keys(tmp_path / "parts/train"), keys(tmp_path / "parts/val")
    assert not train & val
    assert len(train | val) == COUNT
    assert {key[1:] for key in train}.isdisjoint({key[1:] for key in val})
    assert 0.4 < len(train) / COUNT < 0.95
    assert main(["verify", str(tmp_path / "parts/train"), "--workers", "1"]) == 0


def test_a_corpus_that_has_grown_keeps_its_split_and_another_seed_has_another(tars, tmp_path):
    split(tars / "0.tar", tmp_path / "small", "--shares", "train=0.7,val=0.3")
    split(tars, tmp_path / "large", "--shares", "train=0.7,val=0.3")
    split(tars, tmp_path / "other", "--shares", "train=0.7,val=0.3", "--seed", 1)
    assert keys(tmp_path / "small/val") < keys(tmp_path / "large/val")
    assert keys(tmp_path / "other/val") != keys(tmp_path / "large/val")


def test_parts_as_the_samples_say(tars, tmp_path):
    split(tars, tmp_path / "parts", "--field", "split", "--samples-per-shard", 5)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["train", "val"]
    assert keys(tmp_path / "parts/val") == {f"{tar}{number:03d}" for tar in range(2) for number in range(0, 30, 5)}


def test_a_second_run_changes_nothing(tars, tmp_path):
    for _ in range(2):
        split(tars, tmp_path / "parts", "--field", "split")
        whole = contents(tmp_path / "parts")
    (tmp_path / "parts/val/manifest.json").unlink()
    (tmp_path / "parts/val/shard-000000.parquet").unlink()
    (tmp_path / "parts/val/shard-000000.tar").unlink()
    split(tars, tmp_path / "parts", "--field", "split")
    assert contents(tmp_path / "parts") == whole


def test_what_cannot_be_split_is_refused_before_anything_is_written(tars, tmp_path, capsys):
    split(tars, tmp_path / "parts", "--field", "nothing", code=1)
    assert "60 of 60 samples say nothing in 'nothing'" in capsys.readouterr().err
    split(tars, tmp_path / "parts", "--shares", "train=0.999999,val=0.000001", code=1)
    assert "no sample falls into val" in capsys.readouterr().err
    write_shard(tmp_path / "bad.tar", [("a", {"txt": b"x", "json": b'{"split": "../out"}'})])
    split(tmp_path / "bad.tar", tmp_path / "parts", "--field", "split", code=1)
    assert "cannot be a folder of that name" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("text", ["train", "train=0.5", "train=x,val=0.5", "a=0.5,a=0.5", "a=1.5,b=-0.5", ""])
def test_wrong_shares(text):
    with pytest.raises(UsageError, match="bad --shares"):
        parse_shares(text)


def test_one_rule_is_asked_for(tars, tmp_path, capsys):
    split(tars, tmp_path / "parts", code=2)
    assert "--shares" in capsys.readouterr().err
