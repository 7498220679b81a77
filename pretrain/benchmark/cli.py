"""`launch/benchmark.py`: this project and its peers on the same work, side by side, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.arguments import Parser
from data_tools.errors import UsageError
from pretrain.entry import run_entry

_EXAMPLES = """examples:
  samples per second of both trainers, five alternating pairs, and the FLOPs of a step
    python launch/benchmark.py train --shards data/photos_pairs --model configs/models/vit_micro_32.json
  recall of both after the same samples, the mean over three seeds
    python launch/benchmark.py train --recall --shards data/photos_pairs --val data/photos_val \\
        --model configs/models/vit_micro_32.json --epochs 3 --seeds 0 1 2
  the loss curves of both from the same weights on the same batches, fp32
    python launch/benchmark.py train --loss-curve --shards data/photos_pairs --model configs/models/vit_micro_32.json

open_clip's trainer runs in an environment of its own, made on first use in .peers/open_clip. It reads one caption per
sample: pack the shards with `--pairs`."""


def build_parser() -> Parser:
    """The command line; importing nothing heavy, so that `--help` answers at once."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmark.py", description=__doc__, epilog=_EXAMPLES, formatter_class=formatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="train")
    train = kinds.add_parser(
        "train", help="whole trainings against open_clip's trainer", epilog=_EXAMPLES, formatter_class=formatter
    )
    _add_work(train)
    _add_measure(train)
    return parser


def _add_work(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add(
        "--shards",
        required=True,
        help="training corpus: a packed folder, a tar or a brace pattern, one caption a sample",
    )
    add("--model", required=True, type=Path, help="architecture of the towers, an open_clip JSON file")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast over fp32 weights (default)")
    add("--global-batch", type=int, default=256, help="pairs per step over all ranks (default 256)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--weight-decay", type=float, default=0.2, help="default 0.2")
    add("--warmup", type=int, default=20, help="steps of linear warmup (default 20)")
    add("--workers", type=int, default=1, help="loader processes per rank, of both (default 1)")
    add("--ranks", type=int, help="our ranks (default: the GPUs, else 2)")
    add("--peer-ranks", type=int, help="open_clip's (default: a probe picks the faster of 1 and ours)")


def _add_measure(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    what = train.add_mutually_exclusive_group()
    what.add_argument("--recall", action="store_true", help="compare recall after the same samples instead of speed")
    what.add_argument(
        "--loss-curve", action="store_true", help="compare losses from the same weights and batches instead"
    )
    add("--pairs", type=int, default=5, help="speed: alternating pairs of runs (default 5)")
    add("--steps", type=int, default=20, help="speed, loss curve: optimizer steps of a run (default 20)")
    add("--skip-steps", type=int, default=5, help="speed: steps at the start that do not count (default 5)")
    add("--val", help="recall: held-out corpus, all captions of an image in one sample")
    add("--epochs", type=int, default=3, help="recall: passes over the shards (default 3)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="recall: one training by each for every seed")
    add("--curve", action="store_true", help="recall: after every pass, not only after the last")
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="runs and report.json (default runs/benchmark)")
    add("--peer-env", type=Path, default=Path(".peers/open_clip"), help="environment of open_clip's trainer")


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    return run_entry(_main, arguments)


def _main(arguments: list[str]) -> int:
    args = build_parser().parse_args(arguments)
    _check(args)
    from pretrain.benchmark.train import run_train  # late: it imports torch

    return run_train(args)


def _check(args: argparse.Namespace) -> None:
    if args.recall and not args.val:
        raise UsageError("--recall needs a held-out corpus", remedy="--val FOLDER")
    if not 0 <= args.skip_steps < args.steps:
        raise UsageError(
            "--skip-steps leaves nothing to measure", got=args.skip_steps, expected=f"0 .. {args.steps - 1}"
        )
    for name in ("pairs", "steps", "epochs", "global_batch"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is not positive", got=getattr(args, name))
    if not args.model.is_file():
        raise UsageError(f"--model {args.model} is missing", expected="an open_clip architecture JSON")
