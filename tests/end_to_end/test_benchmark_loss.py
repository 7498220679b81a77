"""`benchmark.py loss`: in what order it measures, and that a trial measures what it says."""

import json

import pytest

from launch.benchmark import cli
from launch.benchmark.loss import trials


def test_the_command_measures_both_on_the_same_pairs(tmp_path, capsys):
    words = ["--pairs", "2048", "--alone", "1024", "--dim", "64", "--rounds", "1", "--work-dir", str(tmp_path)]
    assert cli.main(["loss", *words]) == 0
    (path,) = tmp_path.glob("loss-*/report.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["loss"], row["pairs"], row["who"]) for row in rows] == [
        *[(loss, 2048, who) for loss in ("infonce", "sigmoid") for who in ("dualstream", "open_clip")],
        *[(loss, 1024, "dualstream") for loss in ("infonce", "sigmoid")],
    ]
    for ours, theirs in (rows[0:2], rows[2:4]):
        assert ours["loss_value"] == pytest.approx(theirs["loss_value"], rel=1e-5)
        assert ours["peak"] < theirs["peak"]
        assert ours["seconds"]["median"] > 0
    assert [round(row["flops_by_b2d"]) for row in rows[:2]] == [8, 12]
    assert "SigLipLoss" in capsys.readouterr().out


def test_who_is_first_changes_from_round_to_round():
    args = cli.build_parser().parse_args(["loss", "--losses", "infonce", "margin", "--pairs", "8", "--rounds", "2"])
    assert [(trial.loss, trial.who, trial.pairs) for trial in trials(args)] == [
        ("infonce", "dualstream", 8),
        ("infonce", "open_clip", 8),
        ("margin", "dualstream", 8),
        ("infonce", "open_clip", 8),
        ("infonce", "dualstream", 8),
        ("margin", "dualstream", 8),
        *[(loss, "dualstream", pairs) for pairs in (32768, 65536) for loss in ("infonce", "margin")],
    ]


def test_no_pairs_is_a_usage_error(capsys):
    assert cli.main(["loss", "--pairs", "0"]) == 2
    assert "--pairs is not positive; got [0]" in capsys.readouterr().err
