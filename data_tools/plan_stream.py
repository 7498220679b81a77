"""`python -m data_tools plan-stream`: what a training will fetch, keep on disk and shuffle, before it runs."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  python -m data_tools plan-stream --config my.yaml --nodes 8 --bandwidth 2000
  python -m data_tools plan-stream --config my.yaml data.window=65536 train.global_batch=32768"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--config", required=True, metavar="FILE", help="settings of the training")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that share its ranks (default: 1)")
    parser.add_argument(
        "--bandwidth", type=float, default=500.0, metavar="MB/S", help="of one node from the store (default: 500)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from pretrain.config.reading import load_task  # late: only this verb knows of training
    from pretrain.engine.places import check_corpus
    from pretrain.tasks import TASKS

    config = load_task(TASKS, args.config, args.overrides, "contrastive")
    for source in config.data.train:
        check_corpus(source.urls)
    from pretrain.plan.stream import plan_stream  # later still: it imports torch

    return plan_stream(config, args.nodes, args.bandwidth)
