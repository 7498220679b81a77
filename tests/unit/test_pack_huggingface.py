"""Datasets of Hugging Face, written by `datasets` itself and compared with it row by row."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from data_tools.build.accounts import read_accounts
from data_tools.corpus import ShardReader, open_corpus
from data_tools.media.bad import BadSampleError
from data_tools.pack.span import Span
from packing import ROOT, contents, encoded, jpeg, picture

datasets = pytest.importorskip("datasets")
ROWS = 250  # several batches


def made(start=0, rows=ROWS):
    """Pictures of two formats, two captions here and there, classes, and a number."""
    numbers = range(start, start + rows)
    images = [jpeg(n) if n % 3 else encoded(picture(n), "PNG") for n in numbers]
    columns = {
        "image": [
            {"bytes": data, "path": "same.jpg" if n % 2 else None} for n, data in zip(numbers, images, strict=True)
        ],
        "caption": [[f"caption {n}", f"other {n}"][: 1 + n % 2] for n in numbers],
        "label": [n % 3 - (n % 3 == 2) * 3 for n in numbers],  # 0, 1, and -1 for none
        "stars": list(numbers),
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Sequence(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "stars": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def pack(*words, code=0):
    assert main(["pack", *map(str, words), "--workers", "1"]) == code


def packed(folder):
    """(picture, json) of every sample by its number of stars."""
    corpus = open_corpus(folder)
    with ShardReader(corpus) as reader:
        samples = [reader.read(*corpus.locate(position)).members for position in range(corpus.num_samples)]
    found = [(sample["jpg"], json.loads(sample["json"])) for sample in samples]
    return {about["stars"]: (data, about) for data, about in found}


def check(folder, data):
    found = packed(folder)
    assert len(found) == len(data)
    for row in data.cast_column("image", datasets.Image(decode=False)):
        bytes_, about = found[row["stars"]]
        assert bytes_ == row["image"]["bytes"]
        assert about["captions"] == row["caption"]
        assert about.get("image_path") == row["image"]["path"]
        assert about["input_label"] == (["cat", "dog"][row["label"]] if row["label"] >= 0 else None)


def test_parquet_with_pictures(tmp_path, capsys):
    data = made()
    data.to_parquet(tmp_path / "d.parquet")
    pack(tmp_path / "d.parquet", tmp_path / "out")
    assert f"read as: a Hugging Face dataset, {ROWS} images, 375 captions" in capsys.readouterr().out
    check(tmp_path / "out", data)


def test_saved_to_disk_in_several_files(tmp_path):
    data = made()
    data.save_to_disk(tmp_path / "d", num_shards=3)
    pack(tmp_path / "d", tmp_path / "out")
    check(tmp_path / "out", data)


def test_a_dict_of_splits_and_a_folder_of_one(tmp_path):
    train, test = made(0, 20), made(20, 10)
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "d")
    pack(tmp_path / "d", tmp_path / "one", "--where", "split=test")
    check(tmp_path / "one", test)
    pack(tmp_path / "d/train", tmp_path / "two")
    check(tmp_path / "two", train)
    pack(tmp_path / "d", tmp_path / "all")
    check(tmp_path / "all", datasets.concatenate_datasets([train, test]))


def test_parts_of_a_hubs_dataset(tmp_path):
    train, test = made(0, 20), made(20, 10)
    (tmp_path / "d").mkdir()
    train.to_parquet(tmp_path / "d/train-00000-of-00001.parquet")
    test.to_parquet(tmp_path / "d/test-00000-of-00001.parquet")
    pack(tmp_path / "d", tmp_path / "out", "--where", "split=train")
    check(tmp_path / "out", train)


@pytest.mark.parametrize("save", ["parquet", "disk"])
def test_workers_do_not_change_a_byte(tmp_path, save):
    data = made(0, 60)
    path = tmp_path / ("d.parquet" if save == "parquet" else "d")
    data.to_parquet(path) if save == "parquet" else data.save_to_disk(path)
    pack(path, tmp_path / "one", "--samples-per-shard", 20)
    assert main(["pack", str(path), str(tmp_path / "two"), "--samples-per-shard", "20", "--workers", "2"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_class_names_become_labels(tmp_path):
    data = made(0, 12)
    data.save_to_disk(tmp_path / "d")
    pack(tmp_path / "d", tmp_path / "out", "--label-column", "label")
    assert {n: about["label"] for n, (_, about) in packed(tmp_path / "out").items()} == {
        n: ["cat", "dog"][n % 3] for n in range(12) if n % 3 < 2
    }
    skipped = [row["error_class"] for row in read_accounts(tmp_path / "out") if row["status"] == "skipped"]
    assert skipped == ["empty_label"] * 4


def test_bad_rows_are_accounted_for(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    values = [
        {"bytes": jpeg(2)[:300], "path": None},
        {"bytes": b"no picture", "path": None},
        {"bytes": None, "path": "a.jpg"},
        {"bytes": None, "path": "/etc/hostname"},
        {"bytes": None, "path": "gone.jpg"},
        None,
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = {"image": pyarrow.array(values, kind), "caption": ["x"] * 6, "stars": list(range(6))}
    pq.write_table(pyarrow.table(table), tmp_path / "d.parquet")
    pack(tmp_path / "d.parquet", tmp_path / "out")
    assert packed(tmp_path / "out").keys() == {2}
    classes = sorted(row["error_class"] for row in read_accounts(tmp_path / "out") if row["status"] == "skipped")
    assert classes == ["missing_file", "missing_file", "outside_input", "undecodable", "undecodable"]


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "..", "", 5])
def test_a_state_that_leads_elsewhere_is_refused(tmp_path, name, capsys):
    made(0, 2).save_to_disk(tmp_path / "d")
    (tmp_path / "d/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    pack(tmp_path / "d", tmp_path / "out", code=1)
    assert "names no file beside it" in capsys.readouterr().err


def test_a_link_out_needs_leave(tmp_path, capsys):
    made(0, 2).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    file.rename(tmp_path / "elsewhere.arrow")
    file.symlink_to(tmp_path / "elsewhere.arrow")
    pack(tmp_path / "d", tmp_path / "out", code=1)
    assert "remedy: add --follow-links" in capsys.readouterr().err
    pack(tmp_path / "d", tmp_path / "out", "--follow-links")


def test_a_cut_arrow_file_is_refused(tmp_path, capsys):
    made(0, 20).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-3000])
    pack(tmp_path / "d", tmp_path / "out", code=1)
    assert "cannot read" in capsys.readouterr().err


def test_another_column_of_pictures_is_named(tmp_path, capsys):
    made(0, 2).rename_column("image", "photo").to_parquet(tmp_path / "d.parquet")
    pack(tmp_path / "d.parquet", tmp_path / "out", code=2)
    assert "remedy: add --image-column photo" in capsys.readouterr().err
    pack(tmp_path / "d.parquet", tmp_path / "out", "--image-column", "photo")
    assert len(packed(tmp_path / "out")) == 2


def test_a_table_of_paths_may_have_pictures_too(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    thumb = [{"bytes": jpeg(2), "path": None}]
    columns = {"image": ["a.jpg"], "caption": ["x"], "stars": [5], "thumb": thumb}
    pq.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "one")
    assert "read as: a table, 1 images" in capsys.readouterr().out
    table = pyarrow.table(columns).rename_columns(["file", "caption", "stars", "thumb"])
    pq.write_table(table, tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "two", "--format", "table", "--image-column", "file")
    assert packed(tmp_path / "one")[5][0] == packed(tmp_path / "two")[5][0] == jpeg(1)


def test_nothing_is_left_of_the_copied_pictures(tmp_path):
    (tmp_path / "in").mkdir()
    made(0, 3).to_parquet(tmp_path / "in/d.parquet")
    pack(tmp_path / "in/d.parquet", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".tar", ".idx", ".parquet", ".json", ".lock"}


def test_a_picture_that_has_gone_from_its_file_is_a_row(tmp_path):
    file = tmp_path / "d.arrow"
    file.write_bytes(b"123")
    for span in (Span(str(file), 1, 5, None), Span(str(tmp_path), 0, 5, None)):
        with pytest.raises(BadSampleError, match=r"ends within|a folder"):
            span.read(100)
    with pytest.raises(BadSampleError, match="the limit is 4"):
        Span(str(file), 0, 5, None).read(4)


@pytest.mark.parametrize("suffix", [".tar", ".idx", ".parquet"])
def test_a_killed_pack_goes_on(tmp_path, suffix):
    """Killed as soon as the first file of a kind is committed; the copied pictures go with the process."""
    made(0, 200).to_parquet(tmp_path / "d.parquet")
    words = [tmp_path / "d.parquet", tmp_path / "out", "--samples-per-shard", "5"]
    command = [sys.executable, "-m", "data_tools", "pack", *map(str, words), "--workers", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((tmp_path / "out").glob(f"shard-*{suffix}")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/manifest.json").exists()
    pack(*words)
    pack(words[0], tmp_path / "whole", *words[2:])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"d.parquet", "out", "whole"}


def test_shards_do_not_go_into_the_dataset(tmp_path, capsys):
    made(0, 2).save_to_disk(tmp_path / "d")
    before = contents(tmp_path / "d")
    for output in ("d", "d/out"):
        pack(tmp_path / "d", tmp_path / output, code=2)
        assert "inside the input folder" in capsys.readouterr().err
    assert contents(tmp_path / "d") == before
