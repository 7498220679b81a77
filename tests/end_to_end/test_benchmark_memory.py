"""`benchmark.py memory`: which steps it measures, and that a measured step takes what --dry-run promises."""

import json

import pytest

from launch.benchmark import cli, memory
from launch.benchmark.memory_trial import MemoryTrial
from launch.benchmark.peak import MALLOC
from launch.benchmark.trainers import run_trial

MODEL = "configs/models/vit_scenes_16.json"


def test_a_step_takes_what_the_formula_says(tmp_path):
    step = {"zero_stage": 1, "world_size": 1, "pairs": 48, "micro_batch": None, "grad_checkpointing": ()}
    trial = MemoryTrial(model=MODEL, **step, precision="fp32")
    figures = run_trial("memory_trial", trial, tmp_path / "0", variables=MALLOC)
    assert figures["measured"] == pytest.approx(figures["formula"]["total"], rel=0.25)


def test_the_command_measures_stages_ranks_and_savings(tmp_path, monkeypatch, capsys):
    formula = {"weights": 2**20, "total": 2**21}
    monkeypatch.setattr(memory, "run_trial", lambda *_: {"measured": 3 * 2**20, "formula": formula})
    words = ["memory", "--model", MODEL, "--zero-stages", "1", "3", "--work-dir", str(tmp_path)]
    assert cli.main(words) == 0
    (path,) = tmp_path.glob("memory-*/report.json")
    rows = json.loads(path.read_text())["rows"]
    keys = ("zero_stage", "world_size", "micro_batch", "grad_checkpointing")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        *[(stage, size, None, []) for size in (1, 2) for stage in (1, 3)],
        *[(1, 1, None, towers) for towers in (["image"], ["text"], ["image", "text"])],
        *[(1, 1, 8, towers) for towers in ([], ["image", "text"])],
    ]
    table = capsys.readouterr().out
    assert "ZeRO-3" in table
    assert "1.50" in table


def test_a_micro_batch_that_does_not_divide_is_a_usage_error(tmp_path, capsys):
    assert cli.main(["memory", "--model", MODEL, "--pairs", "10", "--work-dir", str(tmp_path)]) == 2
    assert "--micro-batch does not divide --pairs" in capsys.readouterr().err
