"""`benchmark.py chaos`: kills of real ranks under the launcher, and what is made of two runs."""

import json
import subprocess
import sys

import pytest
from PIL import Image

import runs
from data_tools.errors import UserError
from launch.benchmark.chaos import gaps, judge, most_allowed
from launch.benchmark.chaos_picture import draw
from launch.benchmark.cli import main


def test_a_run_through_a_kill_and_another_world_size_keeps_its_curve(tmp_path):
    workspace = runs.make_workspace(tmp_path / "workspace")
    (workspace / "config.yaml").write_text((workspace / "config.yaml").read_text() + "run: {dir: unused}\n")
    script = str(runs.ROOT / "launch" / "benchmark.py")
    words = ["--config", str(workspace / "config.yaml"), "--steps", "40", "--save-every", "2", "--kills", "1"]
    words += [
        "--world-sizes",
        "2",
        "1",
        "--zero-stage",
        "3",
        "--work-dir",
        str(tmp_path / "out"),
        "--delay",
        "0",
        "--seed",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, script, "chaos", *words],
        cwd=tmp_path,
        env=runs.ENV,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next((tmp_path / "out").glob("chaos-*/report.json")).read_text())
    (kill,) = report["kills"]
    assert kill["ranks"] == 2
    assert kill["resumed_from"] <= kill["step"] < 40
    assert max(report["relative_gaps"]["disturbed"].values()) < 1e-5
    assert set(report["relative_gaps"]["control"]) == {str(step) for step in range(1, 41)}
    assert set(report["losses"]["disturbed"]) == {str(step) for step in range(1, 41)}
    log = next((tmp_path / "out").glob("chaos-*/disturbed/output.log")).read_text()
    assert "Killing subprocess" in log  # the launcher has noticed
    assert f"(step {kill['resumed_from']}," in log
    assert Image.open(next((tmp_path / "out").glob("chaos-*/chaos.png"))).width > 500


def test_the_gap_is_relative_and_needs_every_step():
    assert gaps({1: 2.0, 2: 1.1}, {1: 2.0, 2: 1.0}, 2) == pytest.approx({1: 0, 2: 0.1})
    with pytest.raises(UserError, match="disturbed run did not log every step once; got 1; expected 2"):
        gaps({1: 2.0}, {1: 2.0, 2: 1.0}, 2)


def test_a_run_may_part_by_what_rounding_does_and_no_more(capsys):
    control = {1: 0.0, 2: 1e-4, 3: 1e-7}
    allowed = most_allowed(control, 1e-5, 3)
    assert allowed == pytest.approx({1: 1e-5, 2: 1e-3, 3: 1e-3})
    assert judge({1: 1e-6, 2: 5e-4, 3: 9e-4}, control, allowed) == 0
    assert "9.00e-04, without any kill between two world sizes: 1.00e-04" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"left the other.s curve at step 1; got 2\.00e-05"):
        judge({1: 2e-5, 2: 0.0, 3: 0.0}, control, allowed)


def test_the_picture_shows_every_life(tmp_path):
    lives = [{"ranks": 2, "losses": {1: 2.0, 2: 1.5}}, {"ranks": 1, "losses": {2: 1.5, 3: 1.0}}]
    draw(tmp_path / "p.png", {1: 2.0, 2: 1.5, 3: 1.0}, lives, [{"step": 2}], {1: 0.0, 2: 1e-6, 3: 1e-5}, "title")
    picture = Image.open(tmp_path / "p.png").convert("RGB")
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert (0, 0, 0) in colors
    assert len(colors) > 50


def test_more_kills_than_steps_are_a_usage_error(tmp_path, capsys):
    (tmp_path / "a.tar").touch()
    (tmp_path / "c.yaml").write_text(f"run: {{dir: r}}\ndata: {{train: {tmp_path}}}\n")
    assert main(["chaos", "--config", str(tmp_path / "c.yaml"), "--steps", "30", "--kills", "11"]) == 2
    assert "expected at most 10" in capsys.readouterr().err
