"""What becomes of a fine-tuned classifier: its evaluation, and predictions of files, tables and shards."""

from __future__ import annotations

import csv
import io
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import classifier_run
from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from packing import data_tools, encoded, picture
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import load_classifier
from pretrain.evaluate import cli as evaluate_cli
from pretrain.evaluate.results import read_records
from pretrain.predict import cli
from ranks import run_ranks
from stream_corpora import write_corpus

CLASSES = classifier_run.CLASSES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    run_ranks(1, classifier_run.save, folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven pictures in two folders, among them two that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    for number in range(9):
        path = folder / ("deeper" if number % 2 else "") / f"{number}.png"
        path.write_bytes(encoded(picture(number), "PNG"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.md").write_text("no picture")
    return folder


def predict(run, source, output, *more) -> int:
    words = ["--model", run, "--input", source, "--output", output, "--workers", "0", "--batch", "4", *more]
    return cli.main(list(map(str, words)))


def new(folder):
    folder.mkdir()
    return folder


def probabilities(model, data: bytes) -> list[float]:
    """Softmax of the model's scores of one picture, made ready by Pillow as open_clip does it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    resized = image.resize(tuple(int(32 * side / short) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2) for side in resized.size)
    pixels = np.array(resized.crop((left, top, left + 32, top + 32)))
    with torch.no_grad():
        return model.scores(torch.from_numpy(pixels).permute(2, 0, 1)[None]).softmax(dim=1)[0].tolist()


def test_a_folder_becomes_a_row_a_picture_and_none_is_lost(run, photos, tmp_path, capsys):
    assert predict(run, photos, tmp_path / "out/p.parquet", "--top-k", "2") == 0
    said = capsys.readouterr().out
    assert "2 of 11 pictures cannot be read" in said
    assert "broken.jpg: undecodable" in said
    assert "pipe.png: unreadable_file: a named pipe" in said
    table = pq.read_table(tmp_path / "out/p.parquet")
    top = ["id", "prediction", "probability", "prediction_2", "probability_2", "error"]
    assert table.column_names == [*top, "p_cat", "p_dog", "p_red bus"]
    rows = {row["id"]: row for row in table.to_pylist()}
    wanted = {f"{'deeper/' if number % 2 else ''}{number}.png" for number in range(9)} | {"broken.jpg", "pipe.png"}
    assert set(rows) == wanted
    assert len(table) == 11
    model = load_classifier(run)
    for name, row in rows.items():
        if name in ("broken.jpg", "pipe.png"):
            assert row["prediction"] is row["probability"] is row["p_cat"] is None
            assert row["error"]
            continue
        known = probabilities(model, (photos / name).read_bytes())
        assert [row[f"p_{c}"] for c in CLASSES] == pytest.approx(known, abs=1e-5)
        first, second = sorted(range(3), key=lambda number: -known[number])[:2]
        assert (row["prediction"], row["prediction_2"]) == (CLASSES[first], CLASSES[second])
        assert row["probability"] == pytest.approx(known[first], abs=1e-5)
        assert row["error"] is None
    metadata = json.loads(table.schema.metadata[b"dualstream"])
    assert metadata["classes"] == list(CLASSES)
    assert len(metadata["model"]["digest"]) == 32


def test_csv_holds_the_same_and_its_metadata_lie_beside_it(run, photos, tmp_path):
    (tmp_path / "p.csv").write_text("what was there before")
    for name in ("p.csv", "p.parquet"):
        assert predict(run, photos, tmp_path / name, "--workers", "1") == 0
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["id"] for row in rows] == [row["id"] for row in table]
    for row, other in zip(rows, table, strict=True):
        assert row["prediction"] == (other["prediction"] or "")
        if other["prediction"]:
            assert float(row["p_dog"]) == pytest.approx(other["p_dog"], abs=1e-6)
    beside = json.loads((tmp_path / "p.csv.json").read_text())
    inside = json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"dualstream"])
    assert {**beside, "time": ""} == {**inside, "time": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.csv.json", "p.parquet"]


def test_tables_shards_and_single_pictures_are_inputs_too(run, photos, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(f"file,who\n{photos}/0.png,a\ndeeper/1.png,b\nnowhere.png,c\n,d\n")
    assert predict(run, table, tmp_path / "t.parquet", "--image-column", "file", "--image-root", photos) == 0
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"{photos}/0.png", "deeper/1.png", "nowhere.png", "table.csv:5"]
    assert [row["prediction"] is None for row in rows] == [False, False, True, True]
    assert rows[3]["error"] == "bad_row: the row names no image"
    corpus = write_corpus(new(tmp_path / "shards"), [3, 4], {1: {"jpg": b"broken"}, 5: {"jpg": None}})
    for source in (tmp_path / "shards/s-{000000..000001}.tar", photos / "0.png"):
        assert predict(run, source, tmp_path / "s.parquet") == 0
        found = pq.read_table(tmp_path / "s.parquet").to_pylist()
        if source.suffix == ".tar":
            assert [row["id"] for row in found] == [f"{number:06d}" for number in range(corpus.num_samples)]
            assert [row["id"] for row in found if row["error"]] == ["000001", "000005"]
        else:
            assert [row["prediction"] for row in found] == [rows[0]["prediction"]]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--output", "p.txt"], 2, "--output is no file of predictions"),
        (["--input", "nowhere"], 1, "--input nowhere is missing"),
        (["--input", "none.csv"], 1, "--input none.csv is missing"),
        (["--model", "nowhere"], 1, "nowhere"),
        (["--top-k", "0"], 2, "--top-k is too small"),
    ],
)
def test_faults_are_one_line_and_leave_no_file(run, photos, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    given = {"--model": run, "--input": photos, "--output": "p.csv"} | dict([words])
    assert cli.main([str(word) for pair in given.items() for word in pair]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_the_file_that_was_there(run, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"nothing")
    (tmp_path / "p.csv").write_text("before")
    assert predict(run, tmp_path / "bad", tmp_path / "p.csv") == 1
    assert "none of the 1 pictures can be read; got a.png: undecodable" in capsys.readouterr().err
    assert (tmp_path / "p.csv").read_text() == "before"


def evaluate(run, data, *more) -> int:
    words = ["--model", run, "--task", "classification", "--data", data, "--workers", "0", "--batch", "4", *more]
    return evaluate_cli.main(list(map(str, words)))


def test_evaluation_matches_classes_by_name(run, tmp_path, capsys):
    """Pictures of three classes, packed so that their labels stand in another order than the model's."""
    for number in range(12):
        path = tmp_path / "pictures" / ("red bus", "dog", "cat")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number), "PNG"))
    names = {"red bus": "a bus", "dog": "dog", "cat": "cat"}
    data_tools("pack", tmp_path / "pictures", tmp_path / "same", "--labels", "folder")
    (tmp_path / "names.txt").write_text("red bus\ncat\ndog\n")
    (tmp_path / "pictures/red bus").rename(tmp_path / "pictures" / names["red bus"])
    data_tools("pack", tmp_path / "pictures", tmp_path / "other", "--labels", "folder")
    assert open_corpus(tmp_path / "same").classes == CLASSES
    assert open_corpus(tmp_path / "other").classes == ("a bus", "cat", "dog")

    results = tmp_path / "r.jsonl"
    assert evaluate(run, tmp_path / "same", "--output", results) == 0
    assert evaluate(run, tmp_path / "other", "--classes", tmp_path / "names.txt", "--output", results) == 0
    one, two = read_records(results)
    model = load_classifier(run)
    hits = {name: [] for name in CLASSES}
    for name, folder in zip(("red bus", "dog", "cat"), ("a bus", "dog", "cat"), strict=True):
        for path in sorted((tmp_path / "pictures" / folder).iterdir()):
            known = probabilities(model, path.read_bytes())
            hits[name].append(CLASSES[int(np.argmax(known))] == name)
    assert one["metrics"]["top1"] == pytest.approx(np.mean([hit for some in hits.values() for hit in some]))
    assert {row["class"]: row["accuracy"] for row in one["breakdown"]} == pytest.approx(
        {name: np.mean(some) for name, some in hits.items()}
    )
    assert two["metrics"] == pytest.approx(one["metrics"])
    assert two["breakdown"] == one["breakdown"]
    capsys.readouterr()
    assert evaluate(run, tmp_path / "other") == 1
    assert "has classes that the model does not know; got 1 of 3: a bus" in capsys.readouterr().err


def test_labels_without_names_are_the_models_numbers_and_must_be_among_them(run, tmp_path, capsys):
    write_corpus(new(tmp_path / "shards"), [6])
    assert evaluate(run, tmp_path / "shards/s-000000.tar") == 0
    assert "labels are taken for the model's, 0 for cat" in capsys.readouterr().out
    write_corpus(new(tmp_path / "wrong"), [6], {2: {"cls": b"3"}})
    assert evaluate(run, tmp_path / "wrong/s-000000.tar") == 1
    assert "1 images have a label that is no class; expected 0 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("--task", "retrieval"), ("--templates", "openai"), ("--ema",)], ids=lambda words: words[0]
)
def test_a_classifier_is_not_asked_what_it_has_not(run, tmp_path, capsys, words):
    write_corpus(new(tmp_path / "shards"), [6])
    assert evaluate(run, tmp_path / "shards/s-000000.tar", *words) == 1
    assert "is a fine-tuned classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    "head", [None, {"classes": ["a", "a", "b"], "scale": 1.0}, {"classes": [1, 2, 3], "scale": 1.0}, {"scale": 1.0}]
)
def test_a_head_that_makes_no_sense_is_refused(run, monkeypatch, head):
    """The manifest's hashes are right, its content is not."""
    described = CheckpointReader.model
    monkeypatch.setattr(CheckpointReader, "model", lambda self: described(self) | {"head": head})
    with pytest.raises(UserError, match="describes no head of a classifier"):
        load_classifier(run)


def test_a_head_of_other_classes_than_its_weights_is_refused(run, monkeypatch):
    described = CheckpointReader.model
    head = {"classes": ["cat", "dog"], "scale": 14.3}
    monkeypatch.setattr(CheckpointReader, "model", lambda self: described(self) | {"head": head})
    with pytest.raises(UserError, match=r"holds other weights .* got head.weight"):
        load_classifier(run)
