"""`python -m data_tools scenes`: options, and the summary."""

import argparse
import time
from dataclasses import fields
from pathlib import Path

from data_tools.errors import UsageError
from data_tools.parallel import available_cores

EXAMPLES = """examples:
  python -m data_tools scenes corpus/
  python -m data_tools pack corpus/train/captions.jsonl shards/train
  python -m data_tools pack corpus/test/captions.jsonl shards/test
  python -m data_tools pack corpus/minimal_pairs/captions.jsonl shards/minimal_pairs
  python -m data_tools pack corpus/classes/train shards/classes_train --labels folder

The test split holds colour-shape pairs that training never shows. Minimal pairs are two scenes with the same words, one
attribute or the places swapped: a model that ignores what belongs to what scores 50 %. test/shortcuts.json says how far
matching by colours, by shapes, or by all attributes without their groups gets."""

_AMOUNTS = {
    "train": (20_000, "training scenes"),
    "test": (500, "test scenes, no two of the same meaning"),
    "pairs": (300, "minimal pairs, two images each"),
    "class_train": (100, "training images per class (texture and colour), for a classifier"),
    "class_test": (25, "test images per class"),
    "seed": (0, "the corpus follows from it and the amounts alone"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("output", type=Path, help="the folder to write")
    for name, (default, text) in _AMOUNTS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Make the corpus and print what the shortcuts can reach on it."""
    for name in _AMOUNTS:
        least = 0 if name == "seed" else 1
        if getattr(args, name) < least:
            raise UsageError(
                f"--{name.replace('_', '-')} is too small", got=getattr(args, name), expected=f">= {least}"
            )
    from data_tools.scenes.corpus import Amounts, make_corpus  # late: `--help` must answer at once

    started = time.monotonic()
    amounts = Amounts(**{field.name: getattr(args, field.name) for field in fields(Amounts)})
    limits = make_corpus(args.output, amounts, args.workers or available_cores())
    print(f"{amounts.train} training scenes, {amounts.test} test scenes, {amounts.pairs} minimal pairs and classes")
    print(f"in {args.output}, {time.monotonic() - started:.1f} s")
    recalls = ", ".join(f"{name} {value:.1%}" for name, value in limits["test"]["recall_at_1"].items())
    pairs = ", ".join(f"{name} {value:.1%}" for name, value in limits["minimal_pairs"]["accuracy"].items())
    print(f"shortcuts can reach R@1: {recalls}; on minimal pairs: {pairs}")
    return 0
