"""SIGKILL at every commit point of a pack: nothing half-written shows, and the next run ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from packing import ROOT, contents, data_tools, photo_folder

# Imports once, then forks one process per point: the child counts every durable step (fsync, rename, and writes into a
# tar) and kills itself just before step `point`; a second child runs the same command undisturbed.
DRIVER = """
import io, json, os, shutil, signal, sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from data_tools.__main__ import main
from data_tools.pack import command, folder, plan, rows, run
from data_tools.format import commit, writer

source, work = sys.argv[1], Path(sys.argv[2])
WRITES_BETWEEN = 7

def arm(point):
    state = {"step": 0, "writes": 0}
    def step():
        state["step"] += 1
        if state["step"] == point:
            os.kill(os.getpid(), signal.SIGKILL)
    def replace(*arguments):
        step()
        os.replace(*arguments)
    def fsync(descriptor):  # the kernel keeps what a killed process wrote: no need to wait for the disk here
        step()
    def write(self, data, original=writer._HashedFile.write):
        state["writes"] += 1
        if state["writes"] % WRITES_BETWEEN == 0:
            step()
        original(self, data)
    commit.os = SimpleNamespace(**{**vars(os), "fsync": fsync, "replace": replace})
    writer._HashedFile.write = write
    return state

def child(output, point):
    reader, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        state = arm(point)
        with redirect_stdout(io.StringIO()):
            code = main(["pack", source, str(output), "--samples-per-shard", "4", "--workers", "1"])
        os.write(sender, json.dumps([code, state["step"]]).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(reader) as pipe:
        sent = pipe.read()
    _, status = os.waitpid(pid, 0)
    return (json.loads(sent) if sent else None), status

(_, steps), _ = child(work / "whole", 0)
print(json.dumps({"steps": steps}), flush=True)
for point in range(1, steps + 1):
    output = work / f"point{point}"
    sent, status = child(output, point)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    shutil.copytree(output, work / f"killed{point}")
    again, _ = child(output, 0)
    print(json.dumps({"point": point, "killed": killed, "again": again}), flush=True)
"""


def test_kill_at_every_commit_point_then_rerun(tmp_path):
    photos = photo_folder(tmp_path / "photos", 10)
    (photos / "photo.2.jpg").write_bytes(b"not an image")
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", DRIVER, str(photos), str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    # 3 shards of tar, idx and parquet, the claim, the manifest: file, rename, folder each. Then the folder once more.
    assert lines[0]["steps"] >= 3 * (3 * 3 + 2) + 1
    assert len(lines) == lines[0]["steps"] + 1
    whole = contents(work / "whole")
    assert "manifest.json" in whole
    for line in lines[1:]:
        point = line["point"]
        assert line["killed"], line
        assert line["again"][0] == 0, line
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
