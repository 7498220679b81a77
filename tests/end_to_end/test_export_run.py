"""From a checkpoint of several ranks through evaluation and export on the command line, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

import tiny
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.engine.weights import describe
from pretrain.evaluate import cli as evaluate_cli
from pretrain.evaluate.results import read_records
from pretrain.export import cli as export_cli
from pretrain.process.runtime import start
from ranks import run_ranks
from stream_corpora import write_corpus


def _save_checkpoint(rank, world_size, folder):
    runtime, model = start(distributed=True), tiny.build()
    engine = Engine(model, *tiny.settings(8, stage=1), runtime)
    position = {"manifest_digest": "0123abcd", "seed": 7}
    state = TrainState(step=3, samples_seen=24, position=position)
    Checkpoints(folder, runtime).save(engine, state, Extras(describe(model.spec), "seed: 7\n"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint of two ZeRO-1 ranks at step 3, and its log."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, _save_checkpoint, folder)
    rows = [
        {"kind": "eval", "step": 2, "samples": 16, "seconds": 1.0, "image_to_text_recall@1": 0.125},
        {"kind": "eval", "step": 3, "samples": 24, "seconds": 2.0, "image_to_text_recall@1": 0.875},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 images with three captions and one of three labels, in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_corpus(folder, [11, 12])
    (folder / "names.txt").write_text("cat\ndog\nred bus\n")
    return folder


def _evaluate(*words) -> int:
    return evaluate_cli.main([*map(str, words), "--workers", "0", "--batch", "4"])


def test_export_from_another_folder_and_its_card(run, tmp_path, repo_root):
    words = [sys.executable, repo_root / "launch/export.py", run, "out", "--local_rank", "0"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified ") == 6
    card = (tmp_path / "out/README.md").read_text()
    assert "0123abcd" in card
    assert "| samples seen | 24 |" in card
    assert "0.875" in card
    assert "0.125" not in card


def test_a_run_and_its_export_are_the_same_model(run, shards, tmp_path):
    results = tmp_path / "results.jsonl"
    assert export_cli.main([str(run), str(tmp_path / "out"), "--formats", "open_clip", "--no-verify"]) == 0
    for model in (run, tmp_path / "out"):
        words = ("--model", model, "--task", "retrieval", "--data", shards / "s-{000000..000001}.tar")
        assert _evaluate(*words, "--output", results) == 0
    one, other = read_records(results)
    assert one["model"]["digest"] == other["model"]["digest"]
    assert one["key"] == other["key"]
    assert one["metrics"] == other["metrics"]
    assert one["n"] == {"images": 23, "texts": 69, "loss_batch": 23}
    assert one["dataset"]["digest"] == other["dataset"]["digest"]
    assert {"image_to_text_recall@1", "text_to_image_median_rank", "validation_loss"} <= set(one["metrics"])


def test_skip_existing_knows_what_matters(run, shards, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    words = [
        "--model",
        run,
        "--task",
        "classification",
        "--data",
        shards / "s-{000000..000001}.tar",
        "--output",
        results,
    ]
    words += ["--classes", shards / "names.txt", "--skip-existing"]
    assert _evaluate(*words) == 0
    assert _evaluate(*words) == 0
    assert "has this result already" in capsys.readouterr().out
    assert len(read_records(results)) == 1
    assert _evaluate(*words, "--templates", "simple") == 0
    assert _evaluate(*words, "--precision", "bf16") == 0
    records = read_records(results)
    assert len({record["key"] for record in records}) == len(records) == 3
    assert [row["class"] for row in records[0]["breakdown"]] == ["cat", "dog", "red bus"]
    assert sum(row["n"] for row in records[0]["breakdown"]) == 23


def test_the_picture_frames_what_was_asked_for(run, shards, tmp_path):
    words = ("--model", run, "--task", "retrieval", "--data", shards / "s-000000.tar")
    assert _evaluate(*words, "--picture", tmp_path / "deep/picture.png") == 0
    page = Image.open(tmp_path / "deep/picture.png")
    assert page.height == 8 * 138
    green = sum(pixel == (22, 163, 74) for pixel in page.crop((270, 0, *page.size)).get_flattened_data())
    frame = 128**2 - 118**2
    assert green % frame == 0
    assert 0 < green <= 8 * frame


def _evaluate_on_a_rank(rank, world_size, words):
    from pretrain.evaluate import command

    command.finish = lambda: None  # the harness leaves the group itself
    return _evaluate(*words)


def test_two_ranks_write_one_record_with_the_same_numbers(run, shards, tmp_path):
    results = tmp_path / "results.jsonl"
    words = ["--model", run, "--task", "retrieval", "--data", shards / "s-{000000..000001}.tar", "--output", results]
    assert _evaluate(*words) == 0
    assert run_ranks(2, _evaluate_on_a_rank, words) == [0, 0]
    alone, together = read_records(results)
    assert together["environment"]["world_size"] == 2
    assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--model", "nowhere", "--task", "retrieval"], 1, "error: nowhere is missing"),
        (["--task", "pairs"], 1, "error: the corpus has no minimal pairs"),
        (["--task", "classification"], 1, "error: zero-shot classification needs class names"),
        (["--task", "pairs", "--picture", "p.png"], 2, "error: --picture belongs to --task retrieval"),
        (["--task", "retrieval", "--batch", "0"], 2, "error: --batch is too small; got 0"),
        (["--task", "retrieval", "--skip-existing"], 2, "error: --skip-existing needs --output"),
        (["--task", "guessing"], 2, "error: argument --task: invalid choice"),
    ],
)
def test_faults_are_one_line_and_an_exit_code(run, shards, capsys, words, code, message):
    given = ["--model", str(run), "--data", str(shards / "s-000000.tar"), *words]
    assert evaluate_cli.main(given) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_faults_of_export(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, code, message in [
        ([str(run), str(tmp_path / "full")], 1, "exists; expected a new or empty folder"),
        ([str(run), str(tmp_path / "out"), "--formats", "tar"], 2, "unknown export format"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], 1, "is missing"),
        ([str(tmp_path), str(tmp_path / "out")], 1, "holds no model"),
    ]:
        assert export_cli.main(words) == code
        assert message in capsys.readouterr().err


def test_export_refuses_several_ranks(run, tmp_path, repo_root):
    words = [sys.executable, repo_root / "launch/export.py", run, tmp_path / "out"]
    place = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(words, env=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: export runs in one process")
