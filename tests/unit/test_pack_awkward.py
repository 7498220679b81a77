"""A table of everything that goes wrong in tables: its account says, row by row, what was put in."""

from __future__ import annotations

import csv
import json
import os

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from packing import encoded, jpeg, picture, write_jsonl

# (image, caption, error class or None): every row has its own caption, by which it is found again.
ROWS = [
    ("good.jpg", "a plain caption", None),
    ("good.jpg", "a second caption, with a comma", None),
    ("good.png", 'a "quoted" word', None),
    ("./good.webp", '"begins with a quote', None),
    ("sub/../good.gif", 'ends with an inch sign 5"', None),
    ("sub/good.bmp", "on two\nlines", None),
    ("sub/good.bmp", "on three\r\nlines,\nwith, commas", None),
    ("caf\u00e9.jpg", "caf\u00e9 \u4e2d\u6587 \U0001f600", None),
    ("name with spaces.jpg", " spaces around ", None),
    ("link.jpg", "a link within", None),
    ("UPPER.JPG", "='formula", None),
    ("no_suffix", "bytes tell the format", None),
    ("good.jpg", "", "empty_caption"),
    ("good.jpg", "  ", "empty_caption"),
    ("", "names no image", "missing_file"),
    ("gone.jpg", "no such file", "missing_file"),
    ("good.jpg/inside", "a file is no folder", "missing_file"),
    ("sub", "a folder", "unreadable_file"),
    ("pipe.jpg", "a pipe", "unreadable_file"),
    ("empty.jpg", "an empty file", "undecodable"),
    ("text.jpg", "no image", "undecodable"),
    ("cut.jpg", "cut off", "undecodable"),
    ("../outside.jpg", "beside the folder", "outside_input"),
    ("out_link.jpg", "a link out", "outside_input"),
    ("out_folder/outside.jpg", "a linked folder", "outside_input"),
    ("/etc/hostname", "an absolute path", "outside_input"),
    ("https://host/a.jpg", "a URL", "url"),
    ("n" * 300 + ".jpg", "too long a name", "unreadable_file"),
    ("good.png", "h" * 70_000, "huge_text"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward") / "in"
    (folder / "sub").mkdir(parents=True)
    kinds = {"good.png": "PNG", "good.webp": "WEBP", "good.gif": "GIF", "sub/good.bmp": "BMP", "no_suffix": "PNG"}
    for number, name in enumerate(
        ("good.jpg", "caf\u00e9.jpg", "name with spaces.jpg", "UPPER.JPG", "../outside.jpg", *kinds)
    ):
        (folder / name).write_bytes(encoded(picture(number), kinds.get(name, "JPEG")))
    for name, data in (("empty.jpg", b""), ("text.jpg", b"text"), ("cut.jpg", jpeg(9)[:-300])):
        (folder / name).write_bytes(data)
    for name, target in (("link.jpg", "good.jpg"), ("out_link.jpg", "../outside.jpg"), ("out_folder", "..")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.jpg")
    return folder


def written(folder, suffix: str):
    """The rows as a table; of a TSV those that it can hold."""
    rows = [{"image": image, "caption": caption} for image, caption, _ in ROWS]
    path = folder / f"table{suffix}"
    if suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".tsv":
        path.write_text("".join(f"{i}\t{c}\n" for i, c, _ in [("image", "caption", ""), *ROWS] if "\n" not in c))
    elif suffix == ".parquet":
        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_account_is_what_was_put_in(place, tmp_path, capsys, suffix):
    expected = [row for row in ROWS if suffix != ".tsv" or "\n" not in row[1]]
    table = written(place, suffix)
    options = ["--multiline"] if suffix == ".csv" else []
    assert (
        main(["pack", str(table), str(tmp_path / "out"), "--workers", "1", "--samples-per-shard", "7", *options]) == 0
    )
    said = capsys.readouterr().out
    assert main(["rows", str(tmp_path / "out"), "--output", str(tmp_path / "rows.jsonl")]) == 0
    account = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    number = {row["source"]: int(row["source"].split(":")[1]) for row in account}
    account.sort(key=lambda row: number[row["source"]])
    assert len(account) == len(expected)
    for row, (image, caption, error) in zip(account, expected, strict=True):
        assert (row["error_class"], row["status"]) == (error, "skipped" if error else "packed"), (row, image)
        if error != "huge_text":
            assert row["captions"] == ([caption.strip()] if caption.strip() else [])
        if image and error not in ("outside_input", "url"):
            assert row["id"] == os.path.normpath(image)
    packed = {(row["id"], *row["captions"]) for row in account if row["status"] == "packed"}
    assert main(["verify", str(tmp_path / "out"), "--decode", "1", "--workers", "1"]) == 0
    assert f"packed {len({name for name, _ in packed})} samples from {len(packed)} of {len(expected)} rows" in said
