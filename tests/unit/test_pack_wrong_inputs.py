"""What is no input for pack: each kind is named in one short line, with what to do instead."""

from __future__ import annotations

import os
import re
import tarfile

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from packing import jpeg, photo_folder, write_jsonl


@pytest.fixture
def refused(capsys):
    """The one line with which an input is refused."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["pack", *map(str, arguments)]) in (1, 2)
        out, error = capsys.readouterr()
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert len(out + error) < 1500
        assert "\x1b" not in out + error
        return error

    return call


# ---- columns of pictures --------------------------------------------------------------------------------------------

PICTURE = jpeg(1) + bytes(500_000)


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(len(PICTURE))])
def test_a_column_of_bytes_is_named(refused, tmp_path, kind):
    table = pyarrow.table({"image": pyarrow.array([PICTURE], kind), "caption": ["x"]})
    pq.write_table(table, tmp_path / "t.parquet")
    error = refused(tmp_path / "t.parquet", tmp_path / "out")
    assert f"column 'image' of {tmp_path}/t.parquet holds pictures as bytes (jpg, {len(PICTURE)} bytes" in error
    assert "expected paths of image files; remedy: write the pictures to files" in error


@pytest.mark.parametrize("name", ["image.bytes", "jpg", "img"])
def test_pictures_in_a_column_of_another_name_are_found(refused, tmp_path, name):
    pq.write_table(pyarrow.table({"caption": ["x"], name: [PICTURE]}), tmp_path / "t.parquet")
    error = refused(tmp_path / "t.parquet", tmp_path / "out")
    assert (
        f"no column 'image' in {tmp_path}/t.parquet; got caption, {name}; remedy: column '{name}' holds pictures"
        in error
    )
    assert "holds pictures as bytes" in refused(tmp_path / "t.parquet", tmp_path / "out", "--image-column", name)


def test_other_columns_of_bytes_are_left_out_of_the_metadata(capsys, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    columns = {"image": ["a.jpg"], "caption": ["x"], "stars": [5], "thumb": [PICTURE], "image.bytes": [b"\xff"]}
    nested = pyarrow.array([{"b": [b"\xff"], "n": 1}])
    pq.write_table(pyarrow.table({**columns, "nested": nested}), tmp_path / "t.parquet")
    assert main(["pack", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "left out columns of bytes of t.parquet: image.bytes, nested, thumb\n" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "out/shard-000000.parquet")["metadata"].to_pylist() == ['{"stars":5}']


OTHER_VALUES = [
    ({"path": "a.jpg"}, "a dict"),
    (["a.jpg"], "a list"),
    (1.5, "a float"),
    (True, "a bool"),
    ("\x1b[2J" * 999, "name too long"),
    ("/9j/" * 999, "out of"),
    ("/9j/" * 4_000_000, "a text of 16000000 characters"),
    ("data:image/jpeg;base64," + "A" * 99_999, "holds URLs"),
]


@pytest.mark.parametrize(("value", "word"), OTHER_VALUES, ids=[word for _, word in OTHER_VALUES])
def test_other_values_in_the_image_column(refused, tmp_path, value, word):
    out = tmp_path / "out"
    error = refused(write_jsonl(tmp_path / "t.jsonl", [{"image": value, "caption": "x"}]), out)
    assert "nothing was packed" in error or "holds URLs" in error
    if out.exists():
        row = pq.read_table(out / "shard-000000.parquet").to_pylist()[0]
        assert word in row["error"].lower()
        assert len(row["error"]) < 700


@pytest.mark.parametrize("where", ["name", "values", "caption", "label"])
def test_no_message_prints_much_or_raw(refused, tmp_path, where):
    hostile = "\x1b]0;x\x07" + "h" * 100_000
    row = {"image": "a.jpg", "caption": "x", "label": "x"}
    row = {hostile: "a.jpg"} if where == "name" else {**row, {"values": "image"}.get(where, where): hostile}
    options = ["--label-column", "label"] if where == "label" else []
    table = write_jsonl(tmp_path / "t.jsonl", [row] * 3)
    assert "h" * 301 not in refused(table, tmp_path / "out", *options)
    assert "h" * 301 not in refused(table, tmp_path / "out2", "--image-column", hostile, *options)


# ---- URLs -----------------------------------------------------------------------------------------------------------


def test_urls_in_the_image_column_are_urls(refused, tmp_path, capsys):
    rows = [{"image": f"https://user:secret@host/{n}.jpg", "caption": "x"} for n in range(3)]
    error = refused(write_jsonl(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert f"column 'image' of {tmp_path}/t.jsonl holds URLs; expected paths of image files; remedy: fetch" in error
    assert "--image-column" not in error
    assert "secret" not in error
    (tmp_path / "u.tsv").write_text("caption\turl\nx\thttps://host/a.jpg\n")
    error = refused(tmp_path / "u.tsv", tmp_path / "out")
    assert "remedy: column 'url' holds URLs, which pack does not fetch" in error
    assert "--image-column" not in error
    assert "holds URLs" in refused(tmp_path / "u.tsv", tmp_path / "out", "--image-column", "url")
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    some = write_jsonl(tmp_path / "t.jsonl", [*rows[:1], {"image": "a.jpg", "caption": "x"}])
    assert main(["pack", str(some), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "skipped 1 rows: url 1\n" in capsys.readouterr().out


# ---- inputs that are no folder of pictures and no table -------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    photo_folder(tmp_path / "photos", 2)
    for name in ("tars", "root/test", "root/train", "tables", "mixed/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.tar", "tars/0.tar", "tars/1.tar", "root/test/0.tar", "mixed/old.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(tmp_path / "photos" / "photo.0.jpg", "0.jpg")
    (tmp_path / "mixed/deep/1.jpg").write_bytes(jpeg(1))
    (tmp_path / "mixed/deep/1.txt").write_text("text")
    for name in (
        "root/test/nshards.txt",
        "root/classnames.txt",
        "a.tar.gz",
        "a.zip",
        "a.json",
        "a.xlsx",
        "tables/t.csv",
    ):
        (tmp_path / name).write_text("1")
    (tmp_path / "tables/t.csv").write_text("image,caption\n")
    os.mkfifo(tmp_path / "pipe.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("photos/*.jpg", r"no such input: photos/\*.jpg, a pattern; .*remedy: name the folder: photos$"),
        ("photos/**/[ab].png", "remedy: name the folder: photos$"),
        ("tars/{0..1}.tar", r"remedy: these are samples already: `python -m data_tools index 'tars/{0..1}.tar'`$"),
        (
            "photos/photo.0.jpg photos/photo.1.jpg",
            "pack takes one input; got 2: .*remedy: name their folder: .*/photos$",
        ),
        ("tars/0.tar tars/1.tar", "got 2: .*remedy: these are samples already: `python -m data_tools index .*/tars`$"),
        ("a.tar", "not a table: a.tar; .*remedy: these are samples already: `python -m data_tools index a.tar`$"),
        ("a.tar.gz", "not a table: .*remedy: unpack it"),
        ("a.zip", "remedy: unpack it"),
        ("a.json", "remedy: write one object per image a line, as .jsonl"),
        ("a.xlsx", r"not a table: a.xlsx; expected a folder of pictures, a table \(.csv .tsv"),
        ("photos/photo.0.jpg", "remedy: name its folder: .*/photos$"),
        ("tars", "tars holds tars; .*remedy: these are samples already: `python -m data_tools index tars`$"),
        ("root", "root lies in CLIP_benchmark's layout; .*`python -m data_tools index root/test`$"),
        ("root/test", "root/test lies in CLIP_benchmark's layout; .*`python -m data_tools index root/test`$"),
        ("tables", "tables holds tables, no pictures; got t.csv; .*remedy: name the table: tables/t.csv$"),
        ("pipe.csv", "pipe.csv is no regular file"),
        ("s3://me:secret@bucket/x.csv", r"no such input: s3://\*\*\*@bucket/x.csv; .*on this machine"),
        ("nowhere", "no such input: nowhere; expected a folder of pictures"),
    ],
)
def test_other_inputs_are_named_with_what_to_do(refused, place, inputs, words):
    error = refused(*inputs.split(), "out").rstrip("\n")
    assert re.search(words, error), error
    assert not (place / "out").exists()


def test_tars_beside_folders_of_pictures_are_ignored(place, capsys):
    assert main(["pack", "mixed", "out", "--workers", "1"]) == 0
    assert "ignored 1 files" in capsys.readouterr().out
    assert "a packed corpus" in [main(["pack", "out", "again"]), capsys.readouterr().err][1]


def test_semicolons_and_tabs_are_read_and_said(place, capsys):
    for name, mark, word in (("s.csv", ";", "semicolons"), ("t.csv", "\t", "tabs")):
        (place / name).write_text(f"image{mark}caption\nphotos/photo.0.jpg{mark}a, b\n")
        assert main(["pack", name, f"out-{name}", "--workers", "1"]) == 0
        said = capsys.readouterr().out
        assert f"columns of {name} are separated by {word}\n" in said
        assert "packed 1 samples from 1 of 1 rows\n" in said


def test_a_table_without_a_header_and_what_a_filter_or_a_limit_leaves_out(refused, place, capsys):
    (place / "n.csv").write_text("photos/photo.0.jpg,x\nphotos/photo.1.jpg,y\n")
    assert "remedy: write the names of the columns into the first line" in refused("n.csv", "out")
    (place / "t.csv").write_text("image,caption,n\n" + "".join(f"photos/photo.{n}.jpg,x,{n}\n" for n in (0, 1)))
    assert main(["pack", "t.csv", "filtered", "--where", "n=1", "--workers", "1"]) == 0
    assert "kept 1 of 2 rows, those with n=1\n" in capsys.readouterr().out
    assert main(["pack", "t.csv", "limited", "--limit", "1", "--workers", "1"]) == 0
    assert "took the first 1 of 2 samples, as --limit asks\n" in capsys.readouterr().out
    pq.write_table(pyarrow.table({"image": ["a.jpg"], "caption": [b"bytes"]}), "b.parquet")
    assert "nothing was packed; got 1 rows, all skipped: bad_row 1" in refused("b.parquet", "out")
