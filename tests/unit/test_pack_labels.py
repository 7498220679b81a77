"""Labels of tables and folders: what names a class, what does not, and what prints alike is one class."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import unicodedata

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from data_tools.errors import UserError
from data_tools.pack.folder import read_folder
from data_tools.pack.labels import class_name, counted, in_order
from data_tools.pack.rows import group
from data_tools.pack.table import Columns, read_table
from packing import ROOT, jpeg, write_jsonl

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def labelled(path, rows) -> tuple:
    """(classes, label or error class of each row)."""
    if path.suffix == ".parquet":
        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    source = read_table(path, Columns(label="label"), None)
    items = group(source, pairs=False)
    return source.labels, [row.fault[0] if row.fault else row.label for item in items for row in item.rows]


def rows_of(*labels) -> list[dict]:
    return [{"image": f"{number}.jpg", "label": label} for number, label in enumerate(labels)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_whole_numbers_are_classes_however_they_are_stored(tmp_path, suffix):
    """pandas makes floats of a column of integers in which one is missing."""
    path = tmp_path / f"t{suffix}"
    assert labelled(path, rows_of(1.0, math.nan, 0.0, None, 10.0)) == (
        ("0", "1", "10"),
        ["1", "empty_label", "0", "empty_label", "10"],
    )
    assert labelled(path, rows_of(1, 0, 10))[0] == ("0", "1", "10")
    assert labelled(path, rows_of(0.5, 1.0, math.inf)) == (("1",), ["bad_label", "1", "bad_label"])
    assert labelled(path, rows_of(["cat"], ["cat", "dog"], [])) == ((), ["bad_label"] * 3)
    assert labelled(path, rows_of({"name": "cat"}))[1] == ["bad_label"]


def test_labels_of_text(tmp_path):
    (tmp_path / "t.csv").write_text(
        "image,label\na.jpg,1.0\nb.jpg,1\nc.jpg,nan\nd.jpg,\ne.jpg,0.5\nf.jpg, cat \ng.jpg,NaN\n"
    )
    source = read_table(tmp_path / "t.csv", Columns(label="label"), None)
    assert source.labels == ("1", "cat")
    assert [row.label for row in source.rows] == ["1", "1", "", "", None, "cat", ""]
    for text in ("None", "none", "NA", "1e3", "v1.5", "1.5.2", "007", "-1", "true", "naan", "2 cats", "\u732b"):
        assert class_name(text) == text
    for value, word in ((b"cat", "bytes"), ("c" * 5000, "a text of 5000 characters"), ("9" * 900 + ".5", "999")):
        with pytest.raises(ValueError, match=f"a label is one name or whole number, got .*{word}"):
            class_name(value)


def test_spellings_that_print_alike_are_one_class(tmp_path):
    assert NFC != NFD
    spellings = [NFC, NFD, f" {NFC}\u00a0", f"\u200b{NFD}", f"{NFC}\ufeff"]
    assert labelled(tmp_path / "t.jsonl", rows_of(*spellings)) == ((NFC,), [NFC] * 5)
    assert labelled(tmp_path / "t.jsonl", rows_of("ice  cream", "ice\u00a0cream", "ice cream"))[0] == ("ice cream",)
    assert labelled(tmp_path / "t.jsonl", rows_of("Cat", "cat"))[0] == ("Cat", "cat")  # these print differently
    for name in (NFC, NFD, "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"{len(name)}.jpg").write_bytes(b"")
    source = read_folder(tmp_path / "in", labels=True)
    assert source.labels == (NFC, "dog")
    assert {row.label for row in source.rows} == {NFC, "dog"}


def test_half_a_surrogate_pair_in_a_label_is_packed_under_one_name(tmp_path, capsys):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    table = write_jsonl(tmp_path / "t.jsonl", rows_of("cat \ud83d"))
    assert main(["pack", str(table), str(tmp_path / "out"), "--label-column", "label", "--workers", "1"]) == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["classes"] == ["cat ?"]
    capsys.readouterr()


def test_captions_are_optional_beside_labels(tmp_path):
    captions = ("a cat", "", None, math.nan)
    rows = [{"image": f"{n}.jpg", "label": "cat", "caption": caption} for n, caption in enumerate(captions)]
    for columns in (Columns(label="label"), Columns(label="label", caption="caption")):
        items = group(read_table(write_jsonl(tmp_path / "t.jsonl", rows), columns, None), pairs=False)
        assert [row.fault for item in items for row in item.rows] == [None] * 4
        assert [item.rows[0].captions for item in items] == [["a cat"], [], [], []]
    items = group(read_table(tmp_path / "t.jsonl", Columns(), None), pairs=False)
    assert [row.fault and row.fault[0] for item in items for row in item.rows] == [None, *["empty_caption"] * 3]


SPLITS = [
    "train val",
    "Train Test",
    "train2017 val2017",
    "training_set test_set",
    "train",
    "dev test train",
    "valid eval",
]


@pytest.mark.parametrize("names", SPLITS)
def test_split_folders_are_no_classes(tmp_path, names):
    splits = names.split()
    for split, name in zip(splits, ("cat", "dog", "cow"), strict=False):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"are splits, not classes; got .*remedy: pack each split by itself, such as"):
        read_folder(tmp_path, labels=True)
    assert read_folder(tmp_path / splits[0], labels=True).labels == ("cat",)
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus" / "1.jpg").write_bytes(b"")
    assert "bus" in read_folder(tmp_path, labels=True).labels  # among others, "train" may be a vehicle


def test_order_does_not_depend_on_the_hash_seed():
    script = "from data_tools.pack.labels import in_order; print(in_order({'7', '07', '007', '10', '2'}))"
    command = [sys.executable, "-c", script]
    outputs = {
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in "123"
    }
    assert outputs == {"('2', '007', '07', '7', '10')\n"}
    assert in_order({"b", "10", "9"}) == ("10", "9", "b")


def test_summary_names_classes_and_counts(tmp_path, capsys):
    rows = rows_of(*["cat"] * 3, *["dog"] * 2, "cow", "cat")
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"" if number == 5 else jpeg(number))
    rows[0]["caption"] = "a cat"
    table = write_jsonl(tmp_path / "t.jsonl", [{"caption": "", **row} for row in rows])
    arguments = ["pack", str(table), str(tmp_path / "out"), "--label-column", "label", "--workers", "1"]
    for _ in range(2):  # the second finds its shards there
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert "3 classes: cat 3, cow 0, dog 2\n" in said
        assert "1 of 5 samples have captions\n" in said


def test_many_classes_are_cut_to_the_largest():
    counts = {f"class {n}": n for n in range(1000)}
    text = counted(in_order(counts), counts)
    assert text.startswith("class 999 999, class 998 998")
    assert text.endswith("and 980 more")
    assert len(counted(["x" * 1000], {})) < 100
