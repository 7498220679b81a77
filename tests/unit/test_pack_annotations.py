"""Caption files of datasets: COCO's, Karpathy's, Flickr's; compressed tables; and what says which is which."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest

from data_tools.__main__ import main
from data_tools.build.accounts import read_accounts
from data_tools.corpus import ShardReader, open_corpus
from packing import contents, jpeg


def pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def pack(*words, code=0):
    assert main(["pack", *map(str, words), "--workers", "1"]) == code


def rows(folder):
    return list(read_accounts(folder))


def jsons(folder):
    """The json member of every sample, by the id of its image."""
    corpus = open_corpus(folder)
    with ShardReader(corpus) as reader:
        samples = [reader.read(*corpus.locate(position)) for position in range(corpus.num_samples)]
    return {found["id"]: found for found in (json.loads(sample.members["json"]) for sample in samples)}


COCO = {
    "info": {"year": 2017},
    "licenses": [{"id": 4}],
    "images": [
        {"id": 7, "file_name": "000000000007.jpg", "height": 30, "width": 40, "license": 4},
        {"id": 9, "file_name": "000000000009.jpg", "height": 30, "width": 40, "license": 4},
        {"id": 11, "file_name": "000000000011.jpg"},
        {"id": "none"},
    ],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A dog on a beach."},
        {"image_id": 7, "id": 2, "caption": "Two people ride."},
        {"image_id": 9, "id": 3, "caption": "A beach with a dog.\n"},
        {"image_id": 5, "id": 4, "caption": "of no image"},
    ],
}


def test_coco_captions_with_all_rows_accounted_for(tmp_path, capsys):
    """In COCO's layout: `annotations/` beside the folder of the pictures, which the file's name ends with."""
    pictures(tmp_path / "coco/val2017", ["000000000007.jpg", "000000000009.jpg", "000000000011.jpg"])
    file = write(tmp_path / "coco/annotations/captions_val2017.json", COCO)
    pack(file, tmp_path / "shards")
    told = capsys.readouterr().out
    assert "read as: COCO captions, 3 images, 3 captions" in told
    assert "packed 2 samples from 3 of 6 rows" in told
    found = jsons(tmp_path / "shards")
    assert found["000000000009.jpg"]["captions"] == ["A dog on a beach.", "A beach with a dog."]
    assert found["000000000007.jpg"]["captions"] == ["Two people ride."]
    assert (found["000000000007.jpg"]["image_id"], found["000000000007.jpg"]["license"]) == (7, 4)
    skipped = {row["source"]: row["error_class"] for row in rows(tmp_path / "shards") if row["status"] == "skipped"}
    assert skipped == {
        "captions_val2017.json:images[3]": "bad_row",
        "captions_val2017.json:annotations[3]": "bad_row",
        "captions_val2017.json:image 11": "empty_caption",
    }


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "a.jpg",
            "split": "train",
            "cocoid": 3,
            "sentids": [1, 2],
            "sentences": [{"raw": "One.", "tokens": ["one"]}, {"raw": "Two of them.", "tokens": ["two"]}],
        },
        {"filepath": "val2014", "filename": "b.jpg", "split": "val", "sentences": [{"raw": "Other."}]},
        {"filepath": "val2014", "filename": "c.jpg", "split": "train", "sentences": []},
        {"filepath": "val2014", "filename": "d.jpg", "split": "train", "sentences": [{"raw": 5}]},
        {"sentences": []},
    ],
}


def test_karpathys_splits(tmp_path, capsys):
    pictures(tmp_path / "val2014", [f"{name}.jpg" for name in "abcd"])
    pack(write(tmp_path / "dataset_coco.json", KARPATHY), tmp_path / "shards", "--where", "split=train")
    told = capsys.readouterr().out
    assert "read as: Karpathy's splits" in told
    found = jsons(tmp_path / "shards")
    assert found.keys() == {"val2014/a.jpg"}
    assert found["val2014/a.jpg"]["captions"] == ["One.", "Two of them."]
    assert (found["val2014/a.jpg"]["cocoid"], found["val2014/a.jpg"]["split"]) == (3, "train")
    classes = sorted(row["error_class"] for row in rows(tmp_path / "shards") if row["status"] == "skipped")
    assert classes == ["bad_row", "bad_row", "empty_caption"]


def test_karpathys_flickr_has_no_folder_of_its_own(tmp_path):
    pictures(tmp_path / "Flicker8k", ["a.jpg"])
    content = {
        "images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "One."}]}],
        "dataset": "flickr8k",
    }
    pack(write(tmp_path / "dataset.json", content), tmp_path / "shards", "--image-root", tmp_path / "Flicker8k")
    assert jsons(tmp_path / "shards")["a.jpg"]["captions"] == ["One."]


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token"])
def test_flickrs_token_files(tmp_path, name, capsys):
    pictures(tmp_path / "images", ["1_a.jpg", "2_b.jpg"])
    lines = ["1_a.jpg#0\tA child .", "1_a.jpg#1\tA girl\twith tabs .", "2_b.jpg#0\tKatze läuft .", "no caption", ""]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    pack(tmp_path / name, tmp_path / "shards")
    assert "read as: Flickr tokens, 2 images, 3 captions" in capsys.readouterr().out
    found = jsons(tmp_path / "shards")
    assert found["1_a.jpg"]["captions"] == ["A child .", "A girl\twith tabs ."]
    assert found["2_b.jpg"]["captions"] == ["Katze läuft ."]
    (bad,) = [row for row in rows(tmp_path / "shards") if row["status"] == "skipped"]
    assert (bad["source"], bad["error_class"]) == (f"{name}:4", "bad_row")


def test_tables_and_folders_are_named_too(tmp_path, capsys):
    pictures(tmp_path / "images", ["a.jpg"])
    (tmp_path / "images/a.txt").write_text("one")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\na.jpg,two\n")
    pack(tmp_path / "images", tmp_path / "one")
    pack(tmp_path / "t.csv", tmp_path / "two")
    told = capsys.readouterr().out
    assert "read as: a folder of pictures, 1 images, 1 captions" in told
    assert "read as: a table, 1 images, 2 captions" in told


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", lambda data: _zstd(data))])
@pytest.mark.parametrize("table", ["csv", "jsonl"])
def test_compressed_tables_give_the_same_shards(tmp_path, suffix, compress, table):
    pictures(tmp_path / "images", ["a.jpg", "b.jpg"])
    data = {"csv": b"image,caption\na.jpg,one\nb.jpg,two\n", "jsonl": b'{"image":"a.jpg","caption":"one"}\n'}[table]
    (tmp_path / f"t.{table}").write_bytes(data)
    (tmp_path / f"t.{table}.{suffix}").write_bytes(compress(data))
    pack(tmp_path / f"t.{table}", tmp_path / "plain")
    pack(tmp_path / f"t.{table}.{suffix}", tmp_path / "packed")
    tars = [{n: d for n, d in contents(tmp_path / name).items() if n.endswith(".tar")} for name in ("plain", "packed")]
    assert tars[0] == tars[1] != {}


def _zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_a_cut_compressed_table_is_refused(tmp_path, capsys):
    pictures(tmp_path / "images", ["a.jpg"])
    whole = _zstd(b"image,caption\n" + b"a.jpg,one\n" * 5000)
    (tmp_path / "t.csv.zst").write_bytes(whole[: len(whole) // 2])
    pack(tmp_path / "t.csv.zst", tmp_path / "shards", code=1)
    assert "cannot unpack" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_flickr8ks_captions_txt_is_a_table(tmp_path, end, capsys):
    """As it comes from some places."""
    pictures(tmp_path / "Images", ["a.jpg"])
    lines = ["image,caption", "a.jpg,A child .", 'a.jpg,"A girl , red ."', ""]
    (tmp_path / "captions.txt").write_bytes(end.join(lines).encode())
    pack(tmp_path / "captions.txt", tmp_path / "shards", "--image-root", tmp_path / "Images")
    assert "read as: a table, 1 images, 2 captions" in capsys.readouterr().out
    assert jsons(tmp_path / "shards")["a.jpg"]["captions"] == ["A child .", "A girl , red ."]


def test_format_says_what_an_unknown_name_is(tmp_path, capsys):
    pictures(tmp_path / "images", ["a.jpg"])
    (tmp_path / "captions.txt").write_text("image,caption,stars\na.jpg,one,5\n")
    pack(tmp_path / "captions.txt", tmp_path / "shards", code=2)
    assert "not a table" in capsys.readouterr().err
    pack(tmp_path / "captions.txt", tmp_path / "shards", "--format", "table")
    assert len(jsons(tmp_path / "shards")) == 1


def test_a_wrong_format_is_told_with_what_it_looks_like(tmp_path, capsys):
    pictures(tmp_path / "images", ["a.jpg"])
    file = write(tmp_path / "captions.json", COCO)
    pack(file, tmp_path / "shards", "--format", "karpathy", code=2)
    assert "got what looks like COCO captions; expected Karpathy's splits" in capsys.readouterr().err
    pack(tmp_path / "images", tmp_path / "shards", "--format", "coco", code=2)
    assert "looks like a folder of pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b'{"images": [], "annotations": []}', "remedy: write one object per image a line"),
        (b'{"images": {}, "annotations": 3}', "remedy: write one object per image a line"),
        (b'{"images": [1], "annotations": [{"image_id": 1, "caption": "a"}]}', "nothing was packed"),
        (b"[" * 5000 + b"]" * 5000, "is not JSON"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than"),
    ],
)
def test_json_of_other_kinds_is_refused(tmp_path, content, said, capsys):
    (tmp_path / "captions.json").write_bytes(content)
    assert main(["pack", str(tmp_path / "captions.json"), str(tmp_path / "shards")]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_path_that_leads_out_is_refused(tmp_path):
    pictures(tmp_path / "data/images", ["a.jpg"])
    pictures(tmp_path, ["secret.jpg"])
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "../../secret.jpg"}],
        "annotations": [{"image_id": one, "caption": "text"} for one in (1, 2)],
    }
    pack(write(tmp_path / "data/captions.json", content), tmp_path / "shards")
    assert [row["error_class"] for row in rows(tmp_path / "shards") if row["status"] == "skipped"] == ["outside_input"]
