"""What cameras, browsers, other systems and crawlers leave in folders and tables: packed, or listed with its reason."""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata

import pytest

from data_tools.__main__ import main
from data_tools.errors import UserError
from data_tools.remote.urls import expand_braces
from packing import encoded, jpeg, picture


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def account(folder, tmp_path):
    target = tmp_path / "account.jsonl"
    assert main(["rows", str(folder), "--output", str(target)]) == 0
    rows = map(json.loads, target.read_text().splitlines())
    return {row["source"]: row["error_class"] or row["captions"] for row in rows}


def test_every_picture_of_a_camera_folder_is_packed_or_listed(tmp_path, capsys):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    files = {
        "0.JPG": jpeg(0),
        "0.TXT": "upper case",
        "0.NEF": b"the same picture, raw",
        "1.Jpg": jpeg(1),
        "1.Json": '{"captions": [], "caption": "one"}',
        "2.jfif": jpeg(2),
        "2.txt": "from a browser",
        "3.avif": encoded(picture(3), "AVIF"),
        "3.txt": "as the bytes tell",
        "4.HEIC": b"\0\0\0\x18ftypheic",
        "4.txt": "lost unless listed",
        "5.cr2": b"II*\0",
        f"{decomposed}.jpg": jpeg(6),
        f"{composed}.txt": "spelled otherwise",
        "@eaDir/0.JPG/SYNOPHOTO_THUMB_M.jpg": jpeg(7),
        "Thumbs.db": "x",
    }
    put(tmp_path / "in", files)
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert account(tmp_path / "out", tmp_path) == {
        "0.JPG": ["upper case"],
        "1.Jpg": ["one"],
        "2.jfif": ["from a browser"],
        "3.avif": ["as the bytes tell"],
        "4.HEIC": "unread_format",
        "5.cr2": "unread_format",
        f"{decomposed}.jpg": ["spelled otherwise"],
    }
    assert "ignored 3 files that are neither images nor text beside an image: " in said
    assert all(kind in said for kind in ("1 .nef", "1 .db", "1 .txt"))
    assert main(["verify", str(tmp_path / "out"), "--decode", "1", "--workers", "1"]) == 0


def nested(levels):
    return '{"a":' * levels + "1" + "}" * levels


def test_deep_metadata_are_a_bad_row(tmp_path):
    table = "".join(
        f'{{"image": "{n}.jpg", "caption": "c", "m": {nested(depth)}}}\n' for n, depth in enumerate((9, 900))
    )
    put(tmp_path / "in", {"0.jpg": jpeg(0), "1.jpg": jpeg(1), "1.json": nested(900), "0.txt": "c", "t.jsonl": table})
    for source, names in (("in/t.jsonl", ("t.jsonl:1", "t.jsonl:2")), ("in", ("0.jpg", "1.jpg"))):
        out = tmp_path / source.replace("/", "_")
        assert main(["pack", str(tmp_path / source), f"{out}.out", "--workers", "1"]) == 0
        assert account(tmp_path / f"{out.name}.out", tmp_path) == {names[0]: ["c"], names[1]: "bad_row"}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'[{"image": "0.jpg", "caption": "a"}]', "one JSON array"),
        ("a.jsonl", b'{\n "image": "0.jpg"\n}\n', "jq -c \\."),
        ("a.csv", b"BZh91AY&SY\xa2", "bunzip2"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "Excel"),
        ("a.csv", b"image,caption\n0.jpg,\x93a\x94\n", "iconv -f windows-1252"),
        ("a.csv", b"Image,caption\n0.jpg,a\n", "--image-column Image"),
    ],
)
def test_remedies_fit_the_fault(tmp_path, capsys, name, data, words):
    put(tmp_path, {name: data, "0.jpg": jpeg(0)})
    assert main(["pack", str(tmp_path / name), str(tmp_path / "out")]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error), error


def test_files_that_macos_hides_in_folders_of_a_tar_are_passed_over(tmp_path, capsys):
    tar = tmp_path / "a.tar"
    put(tmp_path / "photos", {f"{hidden}{n}.{kind}": data for n in "01" for hidden in ("._", "")
                              for kind, data in (("jpg", jpeg(int(n))), ("txt", "c"))})  # fmt: skip
    with tarfile.open(tar, "w") as file:
        for name in ("._0.jpg", "0.jpg", "._0.txt", "0.txt", "._1.jpg", "1.jpg", "._1.txt", "1.txt"):
            file.add(tmp_path / "photos" / name, f"photos/{name}")
    assert main(["index", str(tar), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 samples" in said
    assert "passed over: 4 files" in said
    assert main(["verify", str(tar), "--decode", "1", "--workers", "1"]) == 0


def test_patterns_of_endless_names_are_refused_at_once():
    for pattern in ("{0..99999999}.tar", "{0..9999}/{0..9999}.tar", "{-99999999..0}.tar", "{0..9" + "9" * 5000 + "}"):
        with pytest.raises(UserError, match="brace pattern"):
            expand_braces(pattern)
    assert len(expand_braces("{0..999999}")) == 10**6


def test_verify_says_that_it_reads_disks(capsys):
    assert main(["verify", "s3://user:secret@bucket/a.tar"]) == 2
    error = capsys.readouterr().err
    assert "copy it to this machine" in error
    assert "secret" not in error
