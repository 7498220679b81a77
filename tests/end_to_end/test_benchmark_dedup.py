"""`benchmark.py dedup` and `copies`: what they ask, and that what they count can be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from data_tools.dedup.find import Goes
from launch.benchmark import cli, dedup_trial
from launch.benchmark.copies import KINDS
from packing import encoded


def test_the_search_keeps_its_promise_on_even_and_skewed_hashes(tmp_path, capsys):
    words = ["--hashes", "4000", "--radii", "2", "5", "--workers", "1", "--work-dir", str(tmp_path)]
    assert cli.main(["dedup", *words]) == 0
    (path,) = tmp_path.glob("dedup-*/report.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["radius"], row["skewed"]) for row in rows] == [(2, False), (2, True), (5, False), (5, True)]
    assert [row["faults"] for row in rows] == [0] * 4
    assert rows[1]["goes"] > 4000 * dedup_trial._EQUAL - 2
    assert rows[2]["goes"] > 10
    assert all(row["peak"] > 2**20 for row in rows)
    assert "skewed" in capsys.readouterr().out


def test_a_broken_promise_is_counted():
    """Near pictures that both stay; one that goes for a far one; one that goes for one that goes."""
    hashes = np.array([0, 1, 2**40 - 1, 2**63], np.uint64)
    none = Goes(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    assert dedup_trial._faults(hashes, none, 1) == 2
    far = Goes(np.array([0, 1]), np.array([3, 2]), np.zeros(2, np.uint8))
    assert dedup_trial._faults(hashes, far, 1) == 1
    chain = Goes(np.array([0, 1]), np.array([1, 3]), np.zeros(2, np.uint8))
    assert dedup_trial._faults(hashes, chain, 2) == 1


def test_every_kind_of_copy_is_planted(tmp_path, capsys):
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((200, 160), Image.Resampling.BICUBIC)
        (tmp_path / f"{seed}.png").write_bytes(encoded(picture, "PNG"))
    (tmp_path / "broken.png").write_bytes(b"broken")
    assert cli.main(["copies", "--pictures", str(tmp_path), "--radii", "8", "--work-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("copies-*/report.json")
    report = json.loads(path.read_text())
    assert report["pictures"] == 3
    assert set(report["shares"]) == set(KINDS)
    assert report["shares"]["mirrored"] == {"8": 1.0}
    assert report["others"] == {"8": 0}
    assert "of 3 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dedup", "copies"])
def test_wrong_words_are_usage_errors(kind, tmp_path, capsys):
    folder = ["--pictures", str(tmp_path)] if kind == "copies" else []
    assert cli.main([kind, *folder, "--radii", "0"]) == 2
    assert "--radii is not positive" in capsys.readouterr().err


def test_a_folder_without_pictures_is_told(tmp_path, capsys):
    assert cli.main(["copies", "--pictures", str(tmp_path)]) == 1
    assert "no pictures in" in capsys.readouterr().err
