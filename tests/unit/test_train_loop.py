"""What the loop says of itself, driven with a job that does nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from data_tools.errors import UserError
from pretrain import train
from pretrain.config.tree import DataConfig, LogConfig, RunConfig
from pretrain.engine.state import TrainState
from pretrain.process.runtime import Runtime
from pretrain.process.status import Status
from pretrain.tasks import ContrastiveConfig
from pretrain.train import Run


def idle_stream(global_batch: int) -> SimpleNamespace:
    """What the loop asks of a stream of a hundred steps."""
    return SimpleNamespace(
        steps_per_epoch=100,
        sources=[None],
        mixture=SimpleNamespace(epochs_at=lambda step: step / 100, samples_seen=lambda step: step * global_batch),
        describe=list,
        steps_until=lambda *_: 100,
        too_many_bad=lambda *_: False,
        check_writes=lambda: None,
        close=lambda: None,
    )


def idle_run(folder, rank: int = 0) -> Run:
    """A run of one-step logging intervals whose steps cost nothing."""
    config = ContrastiveConfig(
        run=RunConfig(dir=str(folder)), data=DataConfig(workers=3, scaled_decode=False), log=LogConfig(every="1 steps")
    )
    job = SimpleNamespace(
        config=config,
        runtime=Runtime(rank, 1, 0, torch.device("cpu"), 1),
        engine=SimpleNamespace(grad_norm=0.0, scalars=dict),
        stream=idle_stream(config.train.global_batch),
        state=TrainState(),
        resumed_from=None,
    )
    status = Status(folder, rank == 0)
    status.own()
    asked = SimpleNamespace(reason=None, heed=lambda: None)
    return Run(job, SimpleNamespace(status=status, stop=asked))


def log_steps(run: Run, steps: int, waited: float) -> None:
    """Log `steps` steps, each of which waited so many seconds."""
    for _ in range(steps):
        run.job.state.step += 1
        run.job.state.samples_seen += run.job.config.train.global_batch
        run.account(SimpleNamespace(bad=[]), torch.tensor(1.0), waited)


def test_a_starving_run_says_so_once_with_the_remedy(tmp_path, capsys):
    run = idle_run(tmp_path)
    log_steps(run, 4, waited=0.0)
    assert "waiting for data" not in capsys.readouterr().out
    log_steps(run, 8, waited=10.0)
    run.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert len(said) == 1
    assert "data.workers (3 per rank now" in said[0]
    assert "data.scaled_decode=true" in said[0]


def test_other_ranks_say_nothing(tmp_path, capsys):
    run = idle_run(tmp_path, rank=1)
    log_steps(run, 8, waited=10.0)
    run.close()
    assert capsys.readouterr().out == ""


def test_a_folder_of_checkpoints_that_is_a_file_is_told_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"opening the files of run.dir .*checkpoints"):
        idle_run(tmp_path)


def test_every_legal_seed_seeds_every_step():
    states = set()
    for seed in (0, 2**40, 2**64 - 1):
        train.seed_step(seed, 10**7, 4095)
        states.add(torch.initial_seed())
    assert len(states) == 3
