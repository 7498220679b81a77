"""`benchmark.py step`: what each variant is, and that a trial measures it."""

import json
from pathlib import Path

import pytest

from launch.benchmark import cli, step
from launch.benchmark.step import variant

MODEL = "configs/models/vit_scenes_16.json"


def test_the_command_measures_ours_and_theirs_in_turn(tmp_path, capsys):
    architecture = json.loads(Path(MODEL).read_text())
    architecture["vision_cfg"]["patch_dropout"] = 0.25  # whose random bits a benchmark has to bring
    (tmp_path / "dropping.json").write_text(json.dumps(architecture))
    words = [
        "--variants",
        "bare",
        "zero1",
        "cached",
        "open_clip",
        "--batch",
        "16",
        "--micro-batch",
        "8",
        "--steps",
        "1",
    ]
    words += ["--rounds", "1", "--precision", "fp32", "--peak-tflops", "1", "--work-dir", str(tmp_path)]
    assert cli.main(["step", "--model", str(tmp_path / "dropping.json"), *words]) == 0
    (path,) = tmp_path.glob("step-*/report.json")
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["bare", "zero1", "cached", "open_clip"]
    flops = {name: row["flops"] for name, row in rows.items()}
    assert flops["bare"] == flops["zero1"] == flops["cached"] < flops["open_clip"]  # which pads its texts
    for row in rows.values():
        assert row["peak"] > 2**20
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"]["median"] / 1e12)
    assert "MFU" in capsys.readouterr().out


def test_who_is_first_changes_from_round_to_round(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(step, "run_trial", lambda module, trial, folder: ran.append(trial) or dict.fromkeys(FIGURES, 1))
    words = ["--variants", "bare", "zero3", "--rounds", "2", "--work-dir", str(tmp_path)]
    assert cli.main(["step", "--model", MODEL, *words]) == 0
    assert [trial.who for trial in ran] == ["bare", "dualstream", "dualstream", "bare"]
    assert [trial.zero_stage for trial in ran] == [1, 3, 3, 1]


FIGURES = ("flops", "seconds", "peak")


def test_each_variant_is_the_plain_step_but_for_its_name():
    args = cli.build_parser().parse_args(["step"])
    plain = vars(variant("zero1", args))
    changed = {}
    for name in cli.VARIANTS:
        trial = vars(variant(name, args))
        changed[name] = {key: trial[key] for key in trial if trial[key] != plain[key]}
    assert changed == {
        **{f"zero{stage}": {"zero_stage": stage} if stage != 1 else {} for stage in range(4)},
        "bare": {"who": "bare"},
        "open_clip": {"who": "open_clip"},
        "one-bucket": {"text_buckets": 1},
        "cached": {"micro_batch": 16},
        "checkpointed": {"grad_checkpointing": ("image", "text")},
        "compiled": {"compile": True},
    }


def test_a_micro_batch_that_does_not_divide_is_a_usage_error(capsys):
    assert cli.main(["step", "--batch", "10", "--micro-batch", "4"]) == 2
    assert "--micro-batch does not divide --batch; got 4" in capsys.readouterr().err
