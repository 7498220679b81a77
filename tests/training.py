"""A job that is built already, trained as `launch` does it."""

from __future__ import annotations

from pretrain import train as loop
from pretrain.assemble import claim_run_dir
from pretrain.process.lifeline import Lifeline


def train(job) -> int:
    """The exit code of the loop, run.dir claimed before it. All ranks must call it."""
    with Lifeline(job.config.run.dir) as life:
        claim_run_dir(life.status, job.runtime)
        return loop.train(job, life)
