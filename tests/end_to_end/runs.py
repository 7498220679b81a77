"""A corpus and a model small enough to train in seconds, and the commands as a user gives them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

import tiny
from packing import ROOT, data_tools, jpeg, write_jsonl

IMAGES, BATCH = 48, 16  # three steps an epoch
ENV = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def make_workspace(folder: Path) -> Path:
    """Shards of captioned, labelled pictures, the tiny model's JSON, and config.yaml without a run.dir."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(IMAGES):
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))
        words = [tiny.WORDS[(number * k) % len(tiny.WORDS)] for k in (1, 3, 5)]
        rows.append({"image": f"{number}.jpg", "captions": [" ".join(words), words[0]], "label": words[0]})
    table = write_jsonl(folder / "table.jsonl", rows)
    data_tools("pack", table, folder / "shards", "--label-column", "label", "--samples-per-shard", "20")
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    shards = str(folder / "shards")
    config = {
        "data": {"train": [{"urls": shards}], "workers": 1, "window": 8},
        "model": {"name": str(folder / "tiny.json")},
        "optim": {"lr": 1e-3, "warmup": "2 steps"},
        "train": {"duration": "6 steps", "global_batch": BATCH, "precision": "fp32"},
        "eval": {"batch": 10},
        "evaluators": {"retrieval": {"data": shards}, "classification": {"data": shards}},
        "checkpoint": {"every": "2 steps"},
        "log": {"every": "1 steps"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(workspace: Path, run_dir: Path, *overrides: str, ranks: int = 1, job: str = "pretrain") -> list[str]:
    """The words of a training command, under the deepspeed launcher where there is more than one rank."""
    launcher = [sys.executable] if ranks == 1 else ["deepspeed", "--num_accelerators", str(ranks)]
    if ranks > 1:  # the launcher's fixed port would join runs that are not one
        launcher += ["--master_port", str(20000 + os.getpid() % 20000)]
    script = str(ROOT / "launch" / f"{job}.py")
    return [*launcher, script, "--config", str(workspace / "config.yaml"), f"run.dir={run_dir}", *overrides]


def run(words: list[str], timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, from a folder that is not the repository."""
    return subprocess.run(
        words, cwd="/", env=ENV | env, capture_output=True, text=True, timeout=timeout, start_new_session=True
    )


def run_until(
    words: list[str], run_dir: Path, step: int, number: int, whole_group: bool = True, kind: str | None = None
) -> tuple[int, str]:
    """Start, send signal `number` once a line of `kind` (None: any) at `step` is logged, and wait; returns (exit code,
    output)."""
    process = subprocess.Popen(
        words, cwd="/", env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 150
        while not any(row["step"] >= step for row in rows(run_dir, kind)):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output
    finally:
        if process.poll() is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def rows(run_dir: Path, kind: str | None = None) -> list[dict]:
    """Lines of metrics.jsonl, whole ones only."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in parsed if kind in (None, row["kind"])]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in rows(run_dir, "train")}


def status(run_dir: Path) -> dict:
    """status.json."""
    return json.loads((run_dir / "status.json").read_text())
