"""How every command line ends: readers that leave, disks that are full, worlds that nobody numbered."""

from __future__ import annotations

import subprocess
import sys

import pytest

from packing import ROOT

MAIN = """
import sys
from pretrain.process.entry import refuse_bare_world, run_entry
def main(words):
    BODY
    return 0
sys.exit(run_entry(main))
"""


def run(body, shell="{}", **env):
    script = MAIN.replace("BODY", body)
    (command,) = [shell.format(f'{sys.executable} -c "$SCRIPT"')]
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "SCRIPT": script}
    return subprocess.run(["bash", "-c", command], env=clean | env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("body", ["print('a\\n' * 99999)", "print('a', flush=True); print('b' * 99999)", "print('a')"])
def test_a_reader_that_leaves_causes_no_traceback(body):
    done = run(body, "set -o pipefail; {} | true")
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # it may have written all before the reader left


def test_a_full_disk_is_one_line():
    done = run("open('/dev/full', 'w').write('a' * 99999)")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "no space left" in done.stderr.lower()


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise RuntimeError", 1, "error on rank 0:\nTraceback"),
        ("raise RuntimeError('\\x1b[2J \\ud800 ' + 'x' * 5000)", 1, "error on rank 0:\nTraceback"),
    ],
)
def test_what_is_unexpected_is_said_and_obeyed_by_no_terminal(body, code, text):
    done = run(body)
    assert done.returncode == code
    assert done.stderr.startswith(text)
    assert "\x1b" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 1000


STORE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
WORLDS = [
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "srun started 4 processes"),
    ({"SLURM_NTASKS": "2"}, "srun started 2 processes"),
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "srun started 4 processes"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 2 processes"),
    ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "mpirun started 3 processes"),
]


@pytest.mark.parametrize(("env", "text"), WORLDS)
def test_processes_that_nobody_numbered_are_refused_once(env, text):
    done = run("refuse_bare_world()", **env)
    assert done.returncode == 2
    assert text in done.stderr
    assert "torchrun" in done.stderr
    others = {name: "1" for name in env if name.endswith(("RANK", "PROCID"))}
    if others:
        silent = run("refuse_bare_world()", **env | others)
        assert (silent.returncode, silent.stderr) == (2, "")


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 in a large allocation
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "RANK": "2", "WORLD_SIZE": "4", **STORE},
        {"OMPI_COMM_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_numbered_and_single_processes_are_not(env):
    done = run("refuse_bare_world()", **env)
    assert (done.returncode, done.stderr) == (0, "")


SENSELESS = [
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "x"},
    {"WORLD_SIZE": ""},
    {"WORLD_SIZE": "0", "RANK": "0"},
    {"WORLD_SIZE": "1", "RANK": "x"},
    {"WORLD_SIZE": "\u0662", "RANK": "0", **STORE},
    {"WORLD_SIZE": "2", "RANK": "2", **STORE},
    {"WORLD_SIZE": "2", "RANK": "0", **STORE, "MASTER_PORT": "abc"},
    {"WORLD_SIZE": "2", "RANK": "0", **STORE, "MASTER_PORT": "70000"},
    {"WORLD_SIZE": "2", "RANK": "0"},
]


@pytest.mark.parametrize("env", SENSELESS, ids=str)
def test_numbers_that_make_no_sense_are_refused(env):
    done = run("refuse_bare_world()", **env)
    assert done.returncode == 2
    assert "makes no sense; got" in done.stderr
    assert done.stderr.count("\n") == 1


def test_training_is_refused_in_a_bare_world_before_it_touches_anything(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path}/run}}\ndata: {{train: {tmp_path}}}\n")
    body = f"import pretrain.cli; return pretrain.cli._run('pretrain', '', '', 'contrastive', ['--config', '{config}'])"
    done = run(body, SLURM_NTASKS="2", SLURM_PROCID="0")
    assert (done.returncode, "srun started 2" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
