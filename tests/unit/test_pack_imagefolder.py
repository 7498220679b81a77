"""Hugging Face's imagefolder, as `datasets` reads it."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from data_tools.build.accounts import read_accounts
from packing import jpeg

ROWS = [{"file_name": f"sub/{n}.jpg", "text": f"caption, {n}", "stars": n} for n in range(4)]


def made(folder, suffix):
    (folder / "sub").mkdir(parents=True)
    for n in range(5):
        (folder / f"sub/{n}.jpg").write_bytes(jpeg(n))
    if suffix == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pyarrow.Table.from_pylist(ROWS), folder / "metadata.parquet")
    return folder


def pack(*words, code=0):
    assert main(["pack", *map(str, words), "--workers", "1"]) == code


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rows_are_those_of_the_library_and_no_picture_is_lost(tmp_path, suffix, capsys):
    datasets = pytest.importorskip("datasets")
    made(tmp_path / "d", suffix)
    pack(tmp_path / "d", tmp_path / "out")
    assert "read as: an imagefolder, 5 images, 4 captions" in capsys.readouterr().out
    found = list(read_accounts(tmp_path / "out"))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "c"))["train"]
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    expected = {row["image"]["path"].rsplit("/", 1)[1]: [row["text"]] for row in theirs}
    packed = {row["id"].rsplit("/", 1)[1]: row["captions"] for row in found if row["status"] == "packed"}
    assert packed == expected
    (lost,) = [row for row in found if row["status"] == "skipped"]
    assert (lost["id"], lost["error_class"]) == ("sub/4.jpg", "empty_caption")


def test_a_filter_takes_only_what_has_metadata(tmp_path):
    pack(made(tmp_path / "d", "csv"), tmp_path / "out", "--where", "stars=2")
    assert [row["id"] for row in read_accounts(tmp_path / "out")] == ["sub/2.jpg"]


@pytest.mark.parametrize("option", [["--format", "folder"], ["--labels", "folder"]])
def test_it_may_be_read_as_a_folder(tmp_path, option, capsys):
    made(tmp_path / "d", "csv")
    (tmp_path / "d/sub/1.txt").write_text("beside")
    pack(tmp_path / "d", tmp_path / "out", *option)
    assert "read as: a folder of pictures" in capsys.readouterr().out
    assert ["beside"] in [row["captions"] for row in read_accounts(tmp_path / "out")]
