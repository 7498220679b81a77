"""A corpus of several picture formats: one member name, nothing lost, in every reader and order of the formats."""

from __future__ import annotations

import io
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
import xxhash
from PIL import Image

from data_tools.__main__ import main
from data_tools.corpus import ShardReader, open_corpus
from data_tools.media.decode import decode_rgb
from data_tools.media.image import sniff
from data_tools.pack.image import common_extension
from packing import contents, encoded, jpeg, picture

EACH = 7  # more of a format than Hugging Face's reader looks at before it settles on the columns


def alpha_png(number: int) -> bytes:
    image = picture(number, mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encoded(image, "PNG")


MAKERS = {
    "jpg": jpeg,
    "png": alpha_png,
    "webp": lambda number: encoded(picture(number), "WEBP", lossless=True),
    "tif": lambda number: encoded(Image.fromarray(np.full((30, 40), 9_000 * number, np.uint16)), "TIFF"),
}


def mixed_folder(folder, order: tuple[str, ...]) -> dict[str, bytes]:
    """Photos whose formats come in that order in the shards, EACH of every one; returns name -> bytes.

    Samples stand in the order of the hash of their name, so names are tried until enough lie in each part of the range.
    """
    folder.mkdir(parents=True)
    written: dict[str, bytes] = {}
    for part, extension in enumerate(order):
        numbers = iter(range(10_000))
        while sum(name.endswith(f".{extension}") for name in written) < EACH:
            name = f"{part}-{next(numbers)}.{extension}"
            if int(xxhash.xxh3_128_hexdigest(name.encode())[:8], 16) * len(order) >> 32 == part:
                written[name] = MAKERS[extension](len(written))
    for name, data in written.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return written


def pack(folder, out, *options) -> str:
    assert main(["pack", str(folder), str(out), "--workers", "1", *map(str, options)]) == 0
    return str(out / "shard-000000.tar")


def by_hand(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("order", [*permutations(("jpg", "png", "webp")), ("tif", "png"), ("tif", "jpg")], ids="-".join)
def test_every_reader_takes_every_picture(tmp_path, order, monkeypatch, capsys):
    import datasets

    datasets.disable_progress_bars()
    written = mixed_folder(tmp_path / "photos", order)
    tar = pack(tmp_path / "photos", tmp_path / "shards")
    expected = {f"caption of {name}": data for name, data in written.items()}

    corpus = open_corpus(tmp_path / "shards")
    with ShardReader(corpus) as reader:
        samples = [reader.read(0, index) for index in range(corpus.num_samples)]
    assert [sniff(sample.members["jpg"]) for sample in samples] == [name for name in order for _ in range(EACH)]
    assert {sample.members["txt"].decode(): sample.members["jpg"] for sample in samples} == expected

    loaded = datasets.load_dataset("webdataset", data_files=[tar], split="train", cache_dir=str(tmp_path / "cache"))
    assert set(loaded.column_names) == {"jpg", "txt", "json", "__key__", "__url__"}
    assert len(loaded) == len(expected)
    for row in loaded:
        assert np.array_equal(np.asarray(row["jpg"]), by_hand(expected[row["txt"]]))

    plain = webdataset.WebDataset(tar, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
    found = {text: np.asarray(image) for image, text in plain}
    assert found.keys() == expected.keys()
    for text, pixels in found.items():
        with Image.open(io.BytesIO(expected[text])) as image:
            assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_the_reader_of_open_clip_takes_every_picture(tmp_path, capsys):
    """That of evaluation: the one of training only shuffles besides, and does not run on webdataset 1.0."""
    from open_clip_train.data import get_wds_dataset

    written = mixed_folder(tmp_path / "photos", ("webp", "jpg", "png"))
    tar = pack(tmp_path / "photos", tmp_path / "shards")
    settings = SimpleNamespace(val_data=tar, val_num_samples=len(written), batch_size=4, workers=0, world_size=1)
    texts = {f"caption of {name}": number for number, name in enumerate(written)}
    reader = get_wds_dataset(
        settings,
        lambda image: torch.from_numpy(np.array(image)),
        is_train=False,
        tokenizer=lambda text: torch.tensor([[texts[text]]]),
    )
    batches = list(reader.dataloader)
    numbers = torch.cat([number.flatten() for _, number in batches]).tolist()
    assert sorted(numbers) == list(range(len(written)))
    images = torch.cat([images for images, _ in batches]).numpy()
    for number, image in zip(numbers, images, strict=True):
        with Image.open(io.BytesIO(list(written.values())[number])) as stored:
            assert np.array_equal(image, np.asarray(stored.convert("RGB")))


def test_a_corpus_of_one_format_keeps_its_name(tmp_path, capsys):
    for extension in MAKERS:
        folder = tmp_path / extension
        mixed_folder(folder, (extension,))
        (folder / "cut.jpg").write_bytes(b"no picture")
        (folder / "cut.txt").write_text("text")
        pack(folder, tmp_path / f"{extension}-shards")
        corpus = open_corpus(tmp_path / f"{extension}-shards")
        with ShardReader(corpus) as reader:
            assert {*reader.read(0, 0).members} == {extension, "txt", "json"}
        manifest = (tmp_path / f"{extension}-shards/manifest.json").read_text()
        assert "image_extension" not in manifest


def test_turned_and_shrunk_pictures_bear_the_name_of_the_others(tmp_path, capsys):
    """They become PNG; a second member name would split the corpus."""
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "photos"
    mixed_folder(folder, ("webp",))
    for number in range(3):
        (folder / f"turned{number}.webp").write_bytes(encoded(picture(number), "WEBP", exif=exif))
        (folder / f"turned{number}.txt").write_text("a caption")
    for options, extension in (((), "webp"), (("--resize", 35), "png"), (("--resize", 10), "png")):
        out = tmp_path / f"shards{len(options) and options[1]}"
        pack(folder, out, *options)
        corpus = open_corpus(out)
        with ShardReader(corpus) as reader:
            samples = [reader.read(0, index).members for index in range(corpus.num_samples)]
        assert {name for members in samples for name in members} == {extension, "txt", "json"}
        assert all(decode_rgb(members[extension]).ndim == 3 for members in samples)


def test_the_name_follows_from_the_formats():
    for formats, resize, expected in (
        (set(), None, None),
        ({"jpg"}, None, "jpg"),
        ({"jpg"}, 64, "jpg"),
        ({"png"}, None, "png"),
        ({"gif"}, None, "gif"),
        ({"gif"}, 64, "png"),
        ({"jpg", "png"}, None, "jpg"),
        ({"png", "webp"}, 64, "jpg"),
    ):
        assert common_extension(formats, resize) == expected


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_formats_are_told_by_their_bytes(extension):
    assert sniff(MAKERS[extension](1)) == extension
    assert sniff(b"") is sniff(b"hello there, world") is None


def test_a_mixed_pack_is_the_same_for_any_number_of_workers(tmp_path, capsys):
    mixed_folder(tmp_path / "photos", ("png", "jpg"))
    for workers in (1, 2):
        out = tmp_path / f"shards{workers}"
        assert (
            main(["pack", str(tmp_path / "photos"), str(out), "--workers", str(workers), "--samples-per-shard", "4"])
            == 0
        )
    assert contents(tmp_path / "shards1") == contents(tmp_path / "shards2")
