"""SIGKILL at every commit point of a pack: nothing half-written shows, and the next run ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from kill_points import killed_at_every_point
from packing import ROOT, contents, data_tools, photo_folder


def test_kill_at_every_commit_point_then_rerun(tmp_path):
    photos = photo_folder(tmp_path / "photos", 10)
    (photos / "photo.2.jpg").write_bytes(b"not an image")
    work = tmp_path / "work"
    steps = killed_at_every_point(["pack", photos, "OUTPUT", "--samples-per-shard", 4, "--workers", 1], work)
    # 3 shards of tar, idx and parquet, the claim, the manifest: file, rename, folder each. Then the folder once more.
    assert steps >= 3 * (3 * 3 + 2) + 1
    whole = contents(work / "whole")
    assert "manifest.json" in whole
    for point in range(1, steps + 1):
        left = contents(work / f"killed{point}")
        visible = {name: data for name, data in left.items() if not name.startswith(".") and name != "pack.json"}
        assert visible.items() <= whole.items(), point  # whole or absent, never half
        order = [name in visible for name in ("shard-000000.tar", "shard-000000.idx", "shard-000000.parquet")]
        assert order == sorted(order, reverse=True), point
        if "manifest.json" in visible:
            assert visible == whole
        assert contents(work / f"point{point}") == whole, point


def test_a_kill_from_outside_loses_nothing(tmp_path):
    """Not at a chosen point: the whole process group, workers included, in the middle of the work."""
    photos = photo_folder(tmp_path / "photos", 150)
    options = ["--samples-per-shard", "5", "--workers", "2"]
    command = [sys.executable, "-m", "data_tools", "pack", photos, tmp_path / "shards", *options]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "shards").glob("*.parquet"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "shards/manifest.json").exists()
    assert "of them from before" in data_tools("pack", photos, tmp_path / "shards", *options).stdout
    data_tools("pack", photos, tmp_path / "fresh", *options)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")
