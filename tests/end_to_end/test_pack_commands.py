"""`pack` as a user runs it: every row accounted for, the same bytes every time, shards that other readers open."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.corpus import ShardReader, open_corpus
from packing import ROOT, contents, data_tools, encoded, jpeg, photo_folder, picture, write_jsonl


def samples(folder):
    corpus = open_corpus(folder)
    with ShardReader(corpus) as reader:
        return [reader.read(s, i) for s in range(len(corpus.paths)) for i in range(corpus.counts[s])]


def rows(folder) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A table with one row of every kind, packed once."""
    folder = tmp_path_factory.mktemp("mixed")
    files = {
        "good.jpg": jpeg(1),
        "grey.png": encoded(picture(2, mode="L"), "PNG"),
        "turned.jpg": jpeg(3, orientation=6),
        "cut.jpg": jpeg(4)[:-300],
        "text.jpg": b"this is not an image",
        "wide.png": encoded(Image.new("1", (4000, 4000)), "PNG"),
        "big.jpg": jpeg(5) + bytes(300_000),
        "silent.jpg": jpeg(6),
    }
    (folder / "images").mkdir()
    for name, data in files.items():
        (folder / "images" / name).write_bytes(data)
    captions = [
        ("good.jpg", "one", 1),
        ("good.jpg", " ", 2),
        ("good.jpg", "two", 3),
        ("silent.jpg", "", 4),
        ("gone.jpg", "x", 5),
    ]
    captions += [(name, f"caption of {name}", 6) for name in files if name not in ("good.jpg", "silent.jpg")]
    write_jsonl(folder / "t.jsonl", [{"image": i, "caption": c, "stars": n} for i, c, n in captions])
    arguments = ("--max-pixels", 10, "--max-megabytes", 0.2, "--name", "mix")
    done = data_tools("pack", folder / "t.jsonl", folder / "shards", *arguments)
    return folder, done


def test_every_row_is_accounted_for(mixed):
    folder, done = mixed
    found = rows(folder / "shards")
    assert len(found) == 11
    by_source = {row["source"]: row for row in found}
    assert sorted(by_source) == sorted(f"t.jsonl:{n}" for n in range(1, 12))
    classes = {(row["id"], row["captions"][0] if row["captions"] else None): row["error_class"] for row in found}
    assert classes == {
        ("good.jpg", "one"): None,
        ("good.jpg", None): "empty_caption",
        ("good.jpg", "two"): None,
        ("silent.jpg", None): "empty_caption",
        ("gone.jpg", "x"): "missing_file",
        ("grey.png", "caption of grey.png"): None,
        ("turned.jpg", "caption of turned.jpg"): None,
        ("cut.jpg", "caption of cut.jpg"): "undecodable",
        ("text.jpg", "caption of text.jpg"): "undecodable",
        ("wide.png", "caption of wide.png"): "decompression_bomb",
        ("big.jpg", "caption of big.jpg"): "too_large",
    }
    assert all((row["status"] == "packed") == (row["error_class"] is None) == (row["error"] is None) for row in found)
    skipped = {"decompression_bomb": 1, "empty_caption": 2, "missing_file": 1, "too_large": 1, "undecodable": 2}
    manifest = json.loads((folder / "shards/manifest.json").read_text())
    assert manifest["totals"]["skipped"] == manifest["shards"][0]["skipped"] == skipped
    assert manifest["totals"]["samples"] == 3
    assert "packed 3 samples from 4 of 11 rows" in done.stdout
    assert "skipped 7 rows: decompression_bomb 1, empty_caption 2" in done.stdout


def test_samples_hold_untouched_bytes_and_true_facts(mixed):
    folder, _ = mixed
    found = {json.loads(sample.members["json"])["id"]: sample for sample in samples(folder / "shards")}
    assert {name: sorted(sample.members) for name, sample in found.items()} == {
        "good.jpg": ["jpg", "json", "txt"],
        "grey.png": ["jpg", "json", "txt"],
        "turned.jpg": ["jpg", "json", "txt"],
    }
    for name in ("good.jpg", "grey.png"):  # of several formats all bear one name
        assert found[name].members["jpg"] == (folder / "images" / name).read_bytes()
    assert found["good.jpg"].members["txt"] == b"one"
    facts = json.loads(found["good.jpg"].members["json"])
    assert facts == {
        **{"captions": ["one", "two"], "id": "good.jpg", "stars": 1, "width": 40, "height": 30, "orientation": 1},
        "sha256": hashlib.sha256((folder / "images/good.jpg").read_bytes()).hexdigest(),
    }
    turned = found["turned.jpg"].members
    facts = json.loads(turned["json"])
    assert (facts["width"], facts["height"], facts["orientation"]) == (30, 40, 6)
    upright = np.asarray(picture(3).transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(turned["jpg"])), int) - upright).mean() < 6
    assert facts["sha256"] == hashlib.sha256(turned["jpg"]).hexdigest()
    for row in rows(folder / "shards"):
        if row["status"] == "packed":
            facts = json.loads(found[row["id"]].members["json"])
            assert (row["key"], row["sha256"]) == (found[row["id"]].key, facts["sha256"])
            assert (row["width"], row["height"]) == (facts["width"], facts["height"])


def test_same_input_gives_the_same_bytes(tmp_path):
    photos = photo_folder(tmp_path / "photos", 30)
    (photos / "photo.3.jpg").write_bytes(b"GIF89a broken")
    options = ("--samples-per-shard", 7)
    for name, workers in (("one", 1), ("two", 2)):
        data_tools("pack", photos, tmp_path / name, *options, "--workers", workers)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert Counter(name.rsplit(".")[-1] for name in one) == {"tar": 5, "idx": 5, "parquet": 5, "json": 1}
    moved = shutil.copytree(photos, tmp_path / "elsewhere" / "other name")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    data_tools("pack", moved, tmp_path / "moved", *options, "--workers", 1)
    assert contents(tmp_path / "moved") == one


def test_a_second_run_keeps_what_is_there_and_mends_the_rest(tmp_path):
    photos = photo_folder(tmp_path / "photos", 20)
    shards = tmp_path / "shards"
    options = ("--samples-per-shard", 5, "--workers", 1)
    data_tools("pack", photos, shards, *options)
    before, stamps = contents(shards), {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert "4 of them from before" in data_tools("pack", photos, shards, *options).stdout
    os.unlink(shards / "shard-000001.tar")
    os.truncate(shards / "shard-000002.tar", 1000)
    (shards / ".shard-000003.tar.0123456789ab.tmp").write_bytes(b"left by a kill")
    assert "2 of them from before" in data_tools("pack", photos, shards, *options).stdout
    assert contents(shards) == before
    kept = {name for name, stamp in stamps.items() if (shards / name).stat().st_mtime_ns == stamp}
    assert {"shard-000000.tar", "shard-000003.tar", "shard-000003.parquet"} <= kept
    assert "shard-000001.tar" not in kept


def test_another_input_or_other_settings_are_refused(tmp_path):
    photos = photo_folder(tmp_path / "photos")
    shards = tmp_path / "shards"
    data_tools("pack", photos, shards)
    before = contents(shards)
    for options in (("--samples-per-shard", 5), ("--resize", 16), ("--limit", 3), ("--name", "other")):
        done = data_tools("pack", photos, shards, *options, ok=False)
        assert "holds shards of another input or other settings" in done.stderr
        assert "remedy: choose another output folder" in done.stderr
    (photos / "photo.1.txt").write_text("another caption")
    assert "another input" in data_tools("pack", photos, shards, ok=False).stderr
    assert contents(shards) == before
    os.rename(shards / "manifest.json", tmp_path / "manifest.json")
    assert "holds tars that are not of this command" in data_tools("pack", photos, shards, ok=False).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "out"], 1, "no such input: nowhere"),
        (["empty", "out"], 1, "no images in"),
        (["README.md", "out"], 2, "not a table"),
        (["photos", "photos/out"], 2, "the output lies inside the input folder"),
        (["photos", "out", "--where", "a=b"], 2, "--where is for tables"),
        (["photos", "out", "--workers", "0"], 2, "--workers is not positive"),
        (["photos", "out", "--name", "a.b"], 2, "bad --name"),
        (["photos", "out", "--colour"], 2, "unrecognized arguments: --colour"),
        (["texts", "out"], 1, "nothing was packed; got 2 rows, all skipped: undecodable 2"),
        (["photos", "file"], 1, "file"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(tmp_path, arguments, code, message):
    photo_folder(tmp_path / "photos", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "file").write_text("text")
    texts = photo_folder(tmp_path / "texts", 2)
    for path in texts.glob("*.jpg"):
        path.write_text("not an image")
    paths = [str(tmp_path / argument) if not argument.startswith("-") and number < 2 else argument
             for number, argument in enumerate(arguments)]  # fmt: skip
    done = data_tools("pack", *paths, ok=False)
    assert done.returncode == code
    assert message.replace("nowhere", str(tmp_path / "nowhere")) in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_two_packs_do_not_write_into_one_folder(tmp_path):
    photos = photo_folder(tmp_path / "photos", 2)
    (tmp_path / "shards").mkdir()
    descriptor = os.open(tmp_path / "shards", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another command is writing" in data_tools("pack", photos, tmp_path / "shards", ok=False).stderr
    finally:
        os.close(descriptor)
    data_tools("pack", photos, tmp_path / "shards")


def test_a_killed_worker_is_reported_and_the_next_run_finishes(tmp_path):
    """The kernel's out-of-memory killer strikes a worker, not the parent."""
    photos = photo_folder(tmp_path / "photos", 12)
    script = """
import os, signal, sys
from data_tools.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
if __name__ == "__mp_main__":
    import data_tools.pack.shard as shard
    shard.check_image = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "killer.py").write_text(script)
    command = [sys.executable, tmp_path / "killer.py", "pack", photos, tmp_path / "shards", "--samples-per-shard", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), "--workers", "2"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 1
    assert "a worker process was killed" in done.stderr
    data_tools("pack", photos, tmp_path / "shards", "--samples-per-shard", 4)
    data_tools("pack", photos, tmp_path / "fresh", "--samples-per-shard", 4)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")


def test_class_folders_pack_numbers_and_names(tmp_path):
    for label in ("dog", "ant", "cat"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / label / f"{number}.jpg").write_bytes(jpeg(number))
    data_tools("pack", tmp_path / "in", tmp_path / "shards", "--labels", "folder")
    corpus = open_corpus(tmp_path / "shards")
    assert corpus.classes == ("ant", "cat", "dog")
    for sample in samples(tmp_path / "shards"):
        facts = json.loads(sample.members["json"])
        assert corpus.classes[int(sample.members["cls"])] == facts["label"] == facts["id"].split("/")[0]
        assert sorted(sample.members) == ["cls", "jpg", "json"]


def test_pairs_and_limit(tmp_path):
    table = write_jsonl(tmp_path / "t.jsonl", [{"image": f"{n}.jpg", "caption": [f"a{n}", f"b{n}"]} for n in range(3)])
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    data_tools("pack", table, tmp_path / "pairs", "--pairs", "--limit", 5)
    found = sorted((json.loads(s.members["json"])["id"], s.members["txt"]) for s in samples(tmp_path / "pairs"))
    assert found == [("0.jpg#0", b"a0"), ("0.jpg#1", b"b0"), ("1.jpg#0", b"a1"), ("1.jpg#1", b"b1"), ("2.jpg#0", b"a2")]
    data_tools("pack", table, tmp_path / "images", "--limit", 2)
    assert sorted(json.loads(s.members["json"])["id"] for s in samples(tmp_path / "images")) == ["0.jpg", "1.jpg"]


def test_plain_webdataset_opens_the_shards(tmp_path):
    import webdataset

    data_tools("pack", photo_folder(tmp_path / "photos"), tmp_path / "shards", "--samples-per-shard", 5)
    urls = str(tmp_path / "shards" / "shard-{000000..000002}.tar")
    theirs = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json")
    )
    ours = samples(tmp_path / "shards")
    assert [key for key, *_ in theirs] == [sample.key for sample in ours]
    for (_, image, text, facts), sample in zip(theirs, ours, strict=True):
        assert image.size == (facts["width"], facts["height"]) == (40, 30)
        assert [text] == facts["captions"] == [sample.members["txt"].decode()]


def test_hugging_face_datasets_opens_the_shards(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data_tools("pack", photo_folder(tmp_path / "photos"), tmp_path / "shards", "--samples-per-shard", 5)
    files = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["__key__"][:] == [sample.key for sample in samples(tmp_path / "shards")]
    assert loaded[0]["jpg"].size == (40, 30)
    assert loaded[0]["json"]["captions"] == [loaded[0]["txt"]]


def test_photos_pack_as_they_are(tmp_path, shared_data):
    table = shared_data / "photos_original" / "captions.csv"
    data_tools("pack", table, tmp_path / "shards", "--limit", 40, "--samples-per-shard", 16)
    found = samples(tmp_path / "shards")
    assert len(found) == 40
    for sample in found:
        facts = json.loads(sample.members["json"])
        assert len(facts["captions"]) == 5
        assert sample.members["jpg"] == (shared_data / "photos_original" / "images" / facts["id"]).read_bytes()


def test_answers_in_under_a_second_and_without_torch(tmp_path):
    photos = photo_folder(tmp_path / "photos", 2)
    for arguments in (
        ["--help"],
        ["pack", "--help"],
        ["verify", "--help"],
        ["scenes", "--help"],
        ["preview", "--help"],
    ):
        before = os.times()
        assert "usage:" in data_tools(*arguments).stdout
        after = os.times()  # processor time: the clock on the wall also counts what else the machine does
        assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0
    script = (
        "import sys; from data_tools.__main__ import main\n"
        f"for arguments in (['pack', {str(photos)!r}, {str(tmp_path / 's')!r}, '--workers', '1'],\n"
        f"                  ['verify', {str(tmp_path / 's')!r}, '--decode', '1', '--workers', '1'],\n"
        f"                  ['preview', {str(tmp_path / 's')!r}, {str(tmp_path / 'p.png')!r}],\n"
        f"                  ['preview', {str(tmp_path / 's')!r}, {str(tmp_path / 'p.html')!r}]):\n"
        "    assert main(arguments) == 0, arguments\n"
        "print('torch' in sys.modules, 'webdataset' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stderr
    assert Image.open(tmp_path / "p.png").size[0] > 224
    assert (tmp_path / "p.html").read_text().count("<img") == 2
