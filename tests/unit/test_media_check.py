"""One judge of what is bad: what packing and verifying pass, training can use."""

from __future__ import annotations

import json
import os
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_tools.__main__ import main
from data_tools.corpus import ShardReader, open_corpus
from data_tools.format.writer import write_shard
from data_tools.media.bad import BadSampleError
from data_tools.media.check import check
from data_tools.media.decode import decode_rgb
from packing import encoded, jpeg, photo_folder, picture
from pretrain.stream.draw import Draw
from pretrain.stream.fields import image as image_field
from pretrain.stream.fields.text import Text
from pretrain.stream.transform import ImageSettings


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int = 40_000) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * 64))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def text_bomb(kind: str) -> bytes:
    """A PNG whose compressed text unfolds to more than Pillow takes."""
    info = PngInfo()
    text = "x" * (2 << 20)
    if kind == "zTXt":
        info.add_text("Comment", text, zip=True)
    else:
        info.add_itxt("Comment", text, zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


def lab_tiff() -> bytes:
    return encoded(picture().convert("LAB"), "TIFF")


TEXT = b"a caption"
AWKWARD = {
    "good": {"jpg": jpeg(1), "txt": TEXT},
    "several lines": {"jpg": jpeg(1), "txt": b"one\ntwo\r\nthree"},
    "json only": {"jpg": jpeg(1), "json": b'{"captions": ["a", "b"]}'},
    "16 bits": {"png": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "PNG"), "txt": TEXT},
    "alpha": {"webp": encoded(picture(mode="RGBA"), "WEBP"), "txt": TEXT},
    "another name": {"jpg": encoded(picture(), "PNG"), "txt": TEXT},
    "cmyk": {"jpg": encoded(picture(mode="CMYK")), "txt": TEXT},
    "byte order mark": {"jpg": jpeg(1), "txt": b"\xef\xbb\xbfa caption"},
    "half a surrogate": {"jpg": jpeg(1), "json": b'{"captions": "a \\ud800 b"}'},
    "lab tiff": {"tif": lab_tiff(), "txt": TEXT},
    "float tiff": {"tif": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "txt": TEXT},
    "huge caption": {"jpg": jpeg(1), "txt": b"x" * 99_999},
    "huge caption in json": {"jpg": jpeg(1), "json": json.dumps({"captions": ["a", "x" * 99_999]}).encode()},
    "huge text": {"jpg": jpeg(1), "txt": b"x" * (1 << 20)},
    "no caption": {"jpg": jpeg(1)},
    "blank caption": {"jpg": jpeg(1), "txt": b" \n "},
    "another extension": {"jpg": jpeg(1), "caption": TEXT},
    "latin-1": {"jpg": jpeg(1), "txt": "caf\xe9 au lait".encode("latin-1")},
    "utf-16": {"jpg": jpeg(1), "txt": "a caption".encode("utf-16")},
    "no json": {"jpg": jpeg(1), "json": b"{", "txt": TEXT},
    "a list for json": {"jpg": jpeg(1), "json": b"[1]", "txt": TEXT},
    "deep json": {"jpg": jpeg(1), "json": b'{"captions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "txt": TEXT},
    "numbers for captions": {"jpg": jpeg(1), "json": b'{"captions": [1, 2]}', "txt": TEXT},
    "no image": {"txt": TEXT},
    "an image of another kind": {"svg": b"<svg/>", "txt": TEXT},
    "not an image": {"jpg": b"no image", "txt": TEXT},
    "cut jpeg": {"jpg": jpeg(1)[:-200], "txt": TEXT},
    "cut png": {"png": encoded(picture(), "PNG")[:-40], "txt": TEXT},
    "eps": {"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "txt": TEXT},
    "bomb": {"png": huge_png(), "txt": TEXT},
    "text bomb": {"png": text_bomb("zTXt"), "txt": TEXT},
    "text bomb of the other kind": {"png": text_bomb("iTXt"), "txt": TEXT},
    "empty": {"jpg": b"", "txt": TEXT},
}
GOOD = list(AWKWARD)[:10]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    tar = tmp_path_factory.mktemp("awkward") / "a.tar"
    write_shard(tar, sorted((name.replace(" ", "_"), members) for name, members in AWKWARD.items()))
    return tar


def bad_in_training(tar) -> dict[str, str]:
    """Key -> kind of what training replaces, through its own ways from stored bytes to pixels and text."""
    corpus, found, field = open_corpus(tar), {}, image_field.Image(ImageSettings(16))
    out = {name: row[0] for name, row in field.rows(1).items()}
    with ShardReader(corpus) as reader:
        for index in range(corpus.num_samples):
            sample = reader.read(0, index)
            try:
                field.train(sample, Draw(0, 0, sample.id), out)
                Text(len).train(sample, Draw(0, 0, sample.id), {})
            except BadSampleError as error:
                found[sample.key.replace("_", " ")] = error.kind
    return found


def test_training_takes_what_it_can_use_and_replaces_the_rest(awkward):
    assert set(bad_in_training(awkward)) == set(AWKWARD) - set(GOOD)


def test_verify_finds_whatever_training_would_replace(awkward, capsys, monkeypatch):
    monkeypatch.setattr("data_tools.verify.samples._SHOWN", 100)
    assert main(["verify", str(awkward), "--decode", "1", "--workers", "1"]) == 1
    printed = capsys.readouterr()
    reported = dict(
        line.split(": sample ", 1)[1].split(": ")[:2] for line in printed.out.splitlines() if ": sample " in line
    )
    assert {key.replace("_", " "): kind for key, kind in reported.items()} == bad_in_training(awkward)
    assert printed.err.count("\n") == 1
    assert max(map(len, printed.out.splitlines())) < 1000


def test_verify_without_decoding_still_reads_the_texts(awkward, capsys):
    assert main(["verify", str(awkward)]) == 1
    printed = capsys.readouterr().out
    for kind in ("no_caption", "huge_text", "bad_text", "bad_json", "no_image"):
        assert kind in printed
    assert "undecodable" not in printed


def test_captions_are_optional_beside_labels_only_where_all_are_labelled(tmp_path, capsys):
    both, label, caption = (
        {"jpg": jpeg(), "cls": b"1", "txt": TEXT},
        {"jpg": jpeg(), "cls": b"0"},
        {"jpg": jpeg(), "txt": TEXT},
    )
    for samples, problem in (
        ([label, label], None),
        ([caption, caption], None),
        ([both, label], "sample 1: no_caption"),
        ([both, caption], "sample 1: no_label"),
        ([label, {"jpg": jpeg(), "cls": b"x"}], "sample 1: bad_label"),
    ):
        write_shard(tmp_path / "a.tar", [(str(number), members) for number, members in enumerate(samples)])
        assert main(["verify", str(tmp_path / "a.tar")]) == (0 if problem is None else 1)
        assert (problem or "no problems") in capsys.readouterr().out


def test_a_shard_of_texts_alone_is_whole(tmp_path, capsys):
    text, picture = {"txt": TEXT}, {"jpg": jpeg(), "txt": TEXT}
    for samples, problem in (
        ([text, text], None),
        ([text, picture], "sample 0: no_image"),
        ([text, {"tiff": jpeg(), "txt": TEXT}, {"label.jpg": jpeg(), "txt": TEXT}], "sample 0: no_image"),
        ([text, {"json": b"{}"}], "sample 1: no_image"),
        ([{"cls": b"0"}, {"cls": b"1"}], "sample 0: no_image"),
    ):
        write_shard(tmp_path / "a.tar", [(str(number), members) for number, members in enumerate(samples)])
        assert main(["verify", str(tmp_path / "a.tar")]) == (0 if problem is None else 1)
        assert (problem or "no problems") in capsys.readouterr().out


def test_verify_goes_by_the_mapping_that_training_is_given(tmp_path, capsys):
    members = {"full.jpg": jpeg(), "json": b'{"alt": "a text"}'}
    write_shard(tmp_path / "a.tar", [("a", members)])
    assert main(["verify", str(tmp_path / "a.tar")]) == 1
    assert (
        main(["verify", str(tmp_path / "a.tar"), "--captions", "json:alt", "--image", "full.jpg", "--decode", "1"]) == 0
    )


# ---- packing --------------------------------------------------------------------------------------------------------


def pack_account(folder, out, *options) -> dict[str, str | None]:
    """Source -> error class, of a folder packed in this process."""
    assert main(["pack", str(folder), str(out), "--workers", "1", *map(str, options)]) == 0
    rows = [row for path in out.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["source"]: row["error_class"] for row in rows}


def test_packing_skips_what_training_would_replace(tmp_path, capsys):
    photos = photo_folder(tmp_path / "photos", 1)
    for name, members in AWKWARD.items():
        for extension, data in members.items():
            (photos / f"{name}.{extension}").write_bytes(data)
    found = pack_account(photos, tmp_path / "shards")
    packed = {os.path.splitext(source)[0] for source, error in found.items() if error is None}
    assert packed == {*GOOD, "photo.0"}
    assert main(["verify", str(tmp_path / "shards"), "--decode", "1", "--workers", "1"]) == 0
    assert not bad_in_training(tmp_path / "shards")


def test_pipes_devices_and_huge_files_are_skipped_unread(tmp_path, capsys):
    photos = photo_folder(tmp_path / "photos", 2)
    os.mkfifo(photos / "pipe.jpg")
    (photos / "pipe.txt").write_text("a caption")
    (photos / "zero.jpg").symlink_to("/dev/zero")
    (photos / "zero.txt").write_text("a caption")
    (photos / "text.jpg").write_bytes(jpeg())
    os.mkfifo(photos / "text.txt")
    (photos / "noise.jpg").write_bytes(jpeg())
    (photos / "noise.json").symlink_to("/dev/zero")
    for name in ("sparse.jpg", "long.txt", "deep.json"):
        with open(photos / name, "wb") as file:
            file.truncate(100 << 30)
    (photos / "sparse.txt").write_text("a caption")
    for name in ("long", "deep"):
        (photos / f"{name}.jpg").write_bytes(jpeg())
    found = pack_account(photos, tmp_path / "shards", "--follow-links")
    assert found == {
        "photo.0.jpg": None,
        "photo.1.jpg": None,
        "pipe.jpg": "unreadable_file",
        "zero.jpg": "unreadable_file",
        "text.jpg": "bad_row",
        "noise.jpg": "bad_row",
        "sparse.jpg": "too_large",
        "long.jpg": "bad_row",
        "deep.jpg": "bad_row",
    }


# ---- the judge itself -----------------------------------------------------------------------------------------------

SEEDS = [
    jpeg(2),
    jpeg(2, progressive=True),
    jpeg(2, orientation=6),
    encoded(picture(2, mode="L")),
    encoded(picture(2, mode="CMYK")),
    encoded(picture(2), "PNG"),
    encoded(picture(2).quantize(16), "PNG", transparency=3),
    encoded(picture(2), "WEBP"),
    encoded(picture(2), "GIF"),
    encoded(picture(2), "BMP"),
    encoded(picture(2), "TIFF"),
    encoded(picture(2), "TIFF", compression="tiff_lzw"),
    encoded(picture(2), "PPM"),
]


def verdict(judge, data: bytes) -> str | None:
    try:
        judge(data)
    except BadSampleError as error:
        return error.kind
    return None


@settings(max_examples=int(os.environ.get("DUALSTREAM_FUZZ", "300")), deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    length=st.floats(0.5, 1.2),
)
def test_whatever_the_check_passes_decodes(data, changes, length):
    mutated = bytearray(data[: int(length * len(data))])
    for place, value in changes:  # headers are where it gets interesting
        mutated[int(place**3 * (len(mutated) - 1))] = value
    if verdict(check, bytes(mutated)) is None:
        assert verdict(decode_rgb, bytes(mutated)) is None
    else:
        verdict(decode_rgb, bytes(mutated))  # a bad sample or pixels, never another error


def test_no_module_changes_pillows_own_limit():
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert verdict(check, huge_png(15_000)) == "decompression_bomb"
    assert check(huge_png(15_000), 1 << 62).width == 15_000
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_larger_pictures_are_packed_only_to_be_shrunk(tmp_path, capsys):
    from data_tools.pack.image import Limits, check_image

    large = encoded(Image.new("1", (12_000, 8_000)), "PNG")
    checked = check_image(large, Limits(200_000_000, 1 << 30, resize=80))
    assert (checked.width, checked.height) == (120, 80)
    with pytest.raises(BadSampleError, match="12000x8000 pixels"):
        check_image(large, Limits(200_000_000, 1 << 30))
    photo_folder(tmp_path / "photos", 1)
    assert main(["pack", str(tmp_path / "photos"), str(tmp_path / "s"), "--max-pixels", "200"]) == 2
    assert "--resize" in capsys.readouterr().err


def test_verify_looks_at_what_a_damaged_tar_still_holds(tmp_path, capsys):
    samples = [(f"k{n:02}", {"jpg": jpeg(n), "txt": b"a text"}) for n in range(20)]
    samples[15][1]["txt"] = b"\xff"
    samples[16][1]["jpg"] = b"no image"
    write_shard(tmp_path / "a.tar", samples)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = data.index(b"k03.jpg")
    data[at + 20 : at + 90] = b"?" * 70
    (tmp_path / "a.tar").write_bytes(data)
    assert main(["verify", str(tmp_path / "a.tar"), "--decode", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"at byte {at}" in printed
    assert "sample k15: bad_text" in printed
    assert "sample k16: undecodable" in printed
    assert printed.count(": sample ") == 2
