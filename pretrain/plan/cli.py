"""`launch/inspect_batch.py`: the samples of any step of a training, as keys or as a contact sheet."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.arguments import Parser
from data_tools.errors import UsageError
from pretrain.engine.places import check_model, check_output
from pretrain.process.entry import run_entry
from pretrain.tasks import read_settings
from pretrain.tasks.paths import check_settings

_EXAMPLES = """examples:
  which samples the step of a loss spike had
    python launch/inspect_batch.py --config runs/a/config.yaml --step 1200
  only those of rank 3 of 8, a tab between rank, position, source, shard and key
    python launch/inspect_batch.py --config my.yaml --step 1200 --world-size 8 --rank 3 --keys
  a page with the pictures as the model sees them, and their captions or classes
    python launch/inspect_batch.py --config my.yaml --step 1200 --html step-1200.html

Steps are counted as in metrics.jsonl, from 1 over all epochs. A run that changed its global batch at a resume, or the
weights of a mixture, needs --checkpoint with the checkpoint it went on from.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    words = Parser(
        prog="python launch/inspect_batch.py",
        description="Show which samples a step of a training takes, without training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = words.add_argument
    add("--config", required=True, metavar="FILE", help="settings of the training; a run keeps its own in config.yaml")
    add("--step", required=True, type=int, metavar="K", help="the step, from 1")
    add("--world-size", type=int, default=1, metavar="W", help="ranks that the global batch is cut for (default 1)")
    add("--rank", type=int, metavar="R", help="only the slice of this rank (default: all)")
    add("--checkpoint", type=Path, metavar="DIR", help="go on from this checkpoint's data position")
    how = words.add_mutually_exclusive_group()
    how.add_argument("--keys", action="store_true", help="rank, position, source, shard and key, one sample a line")
    how.add_argument("--html", type=Path, metavar="FILE", help="write a page of pictures and captions or classes")
    words.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    options = words.parse_intermixed_args(arguments)
    if options.step < 1:
        raise UsageError("--step is not positive", got=options.step, expected="1 or more, as in metrics.jsonl")
    if options.rank is not None and not 0 <= options.rank < options.world_size:
        expected = f"0 .. {options.world_size - 1}"
        raise UsageError("--rank does not fit --world-size", got=options.rank, expected=expected)
    config = read_settings(options.config, options.overrides, "contrastive")
    check_settings(config)
    if options.checkpoint is not None:
        check_model(str(options.checkpoint))
    check_output("--html", options.html)
    from pretrain.plan.batch import show  # late: it imports torch

    return show(config, options)
