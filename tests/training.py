"""A job that is built already, trained as `launch` does it, and an engine without DeepSpeed to build one with."""

from __future__ import annotations

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pretrain import train as loop
from pretrain.engine.fragments import local_fragments
from pretrain.engine.zero import Whole
from pretrain.job import Job
from pretrain.process.lifeline import Lifeline
from pretrain.process.run_dir import claim_run_dir
from pretrain.process.runtime import start
from pretrain.tasks.paths import check_settings


def train(job) -> int:
    """The exit code of the loop, run.dir claimed before it. All ranks must call it."""
    with Lifeline(job.config.run.dir) as life:
        claim_run_dir(life.status, job.runtime)
        return loop.train(job, life)


def train_in_turn(configs) -> list:
    """Build and train the job of each of `configs`: exit codes, or what was raised. All ranks must call it."""
    torch.set_num_threads(1)
    runtime, outcomes = start(distributed=True), []
    for config in configs:
        try:
            check_settings(config)
            with Lifeline(config.run.dir) as life:
                claim_run_dir(life.status, runtime)
                outcomes.append(loop.train(Job(config, runtime), life))
        except UserError as error:
            outcomes.append(str(error))
    return outcomes


class PlainEngine:
    """Torch's optimizer on a small model; to checkpoints it looks like an engine at ZeRO stage 0."""

    grad_norm, ema, optimizer_name = 0.0, None, "adamw"

    def __init__(self, model, rank=0, world_size=1):
        self.module, self._place = model, (rank, world_size)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.zero = Whole(model, self.optimizer)

    def update(self, lr):
        """An update of the gradients' sum over ranks."""
        for parameter in self.module.parameters():
            dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fragments(self, every=False):
        """Those that this rank saves, or all."""
        return local_fragments(self.zero, *((0, 1) if every else self._place))

    def scalars(self):
        """None."""
        return {}
