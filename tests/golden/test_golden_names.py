"""The names in metrics.jsonl and model.json that scripts of users read, of a pretraining and of a fine-tune."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

import tiny
from data_tools.__main__ import main as data_tools
from packing import ROOT, jpeg, write_jsonl
from ranks import run_warm

COMMON = {"kind", "step", "samples", "seconds"}
TRAIN = {"loss", "grad_norm", "lr", "samples_per_second", "data_wait", "bad_samples", "epoch", "skipped_steps"}
DATA = {"epoch", "expected", "read", "replaced"}
SAVED = {"checkpoint_stall", "checkpoint_bytes", "checkpoint_seconds"}
RECALLS = {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
RETRIEVAL = RECALLS | {"image_to_text_median_rank", "text_to_image_median_rank", "validation_loss"}
ACCURACY = {"top1", "top5", "mean_per_class"}
TUNED = ACCURACY | {"validation_loss"}  # a fine-tune's own cross-entropy, for checkpoint.keep_best
SPEC = {"name", "model_cfg", "preprocess_cfg"}

MIXTURE = {"share_0", "share_1"}  # in a run with several sources
SIGMOID = {"logit_bias"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with `pretrained` and `tuned`, runs of two steps with everything on that brings names of its own."""
    folder = tmp_path_factory.mktemp("names")
    _pack(folder)
    shards = str(folder / "shards")
    common = {
        "train": {"duration": "2 steps", "global_batch": 8, "precision": "fp32"},
        "log": {"every": "1 steps"},
    }
    sources = [{"urls": shards, "weight": 2.0}, {"urls": shards, "captions": "txt", "weight": 1.0}]
    data = {"workers": 0, "window": 8}
    pretrain = {
        **common,
        "run": {"dir": str(folder / "pretrained")},
        "data": {**data, "train": sources},
        "model": {"name": str(folder / "tiny.json")},
        "objectives": {"sigmoid": {}},
        "optim": {"ema": 0.9},
        "evaluators": {"retrieval": {"data": shards}, "zero_shot": {"type": "classification", "data": shards}},
    }
    finetune = {
        **common,
        "run": {"dir": str(folder / "tuned")},
        "data": {**data, "train": sources[:1]},
        "init": str(folder / "pretrained"),
        "evaluators": {"classification": {"data": shards}},
    }
    for job, tree in {"pretrain": pretrain, "finetune": finetune}.items():
        (folder / f"{job}.yaml").write_text(yaml.safe_dump(tree))
    run_warm(_train, folder)
    return folder


def _pack(folder: Path) -> None:
    (folder / "images").mkdir()
    rows = []
    for number in range(16):
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append({"image": f"{number}.jpg", "caption": f"caption {number}", "label": tiny.WORDS[number % 6]})
    table = write_jsonl(folder / "table.jsonl", rows)
    assert data_tools(["pack", str(table), str(folder / "shards"), "--label-column", "label", "--workers", "1"]) == 0
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))


def _train(folder: Path) -> None:
    """Both jobs as their scripts start them, each in a process of its own with everything imported."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for job in ("pretrain", "finetune"):
        pid = os.fork()
        if pid == 0:
            _run(job, folder)
        assert os.waitpid(pid, 0)[1] == 0, job


def _run(job: str, folder: Path) -> NoReturn:
    code = 1
    try:
        sys.argv = [f"{job}.py", "--config", str(folder / f"{job}.yaml")]
        runpy.run_path(str(ROOT / "launch" / f"{job}.py"), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        os._exit(code)


def _names(run_dir: Path) -> dict[str, set[str]]:
    """By kind of row, the names of each; all rows of a kind have the same ones."""
    found: dict[str, set[str]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert found.setdefault(row["kind"], set(row)) == set(row)
    return found


def _model(run_dir: Path) -> dict:
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    return json.loads((checkpoint / "model.json").read_text())


def test_names_of_a_pretraining(workspace):
    evaluated = RETRIEVAL | {f"zero_shot_{name}" for name in ACCURACY}
    assert _names(workspace / "pretrained") == {
        "train": COMMON | TRAIN | MIXTURE | SIGMOID | {"logit_scale"},
        "eval": COMMON | evaluated | {f"ema_{name}" for name in evaluated},
        "data": COMMON | DATA,
        "checkpoint": COMMON | SAVED,
    }
    described = _model(workspace / "pretrained")
    assert set(described) == {"spec"}
    assert set(described["spec"]) == SPEC


def test_names_of_a_fine_tune(workspace):
    assert _names(workspace / "tuned") == {
        "train": COMMON | TRAIN,
        "eval": COMMON | TUNED,
        "data": COMMON | DATA,
        "checkpoint": COMMON | SAVED,
    }
    described = _model(workspace / "tuned")
    assert set(described) == {"spec", "head"}
    assert set(described["spec"]) == SPEC
    assert set(described["head"]) == {"classes", "scale"}
    assert described["head"]["classes"] == sorted(tiny.WORDS[:6])
