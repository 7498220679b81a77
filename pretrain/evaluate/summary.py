"""`python -m pretrain.evaluate.summary`: one short table of what a run reached, read from its result files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.arguments import Parser
from data_tools.errors import UserError
from pretrain.evaluate.results import read_records
from pretrain.process.entry import run_entry

_EXAMPLES = """example:
  python -m pretrain.evaluate.summary --results runs/a/results.jsonl --finetuned runs/b --made "export=runs/a/export"
"""
# (task, metric, what the table says of it)
_SHOWN = (
    ("retrieval", "text_to_image_recall@1", "retrieval, text to image, R@1"),
    ("retrieval", "image_to_text_recall@1", "retrieval, image to text, R@1"),
    ("pairs", "image_to_text_accuracy", "minimal pairs, the right caption"),
    ("pairs", "text_to_image_accuracy", "minimal pairs, the right image"),
    ("classification", "top1", "zero-shot classification, top-1"),
)
_CEILINGS = {"retrieval": ("test", "recall_at_1"), "pairs": ("minimal_pairs", "accuracy")}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    words = Parser(
        prog="python -m pretrain.evaluate.summary",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--results", required=True, type=Path, metavar="FILE", help="what launch/evaluate.py wrote")
    words.add_argument("--finetuned", type=Path, metavar="DIR", help="run folder of launch/finetune.py")
    words.add_argument("--shortcuts", type=Path, metavar="FILE", help="shortcuts.json of a generated corpus")
    words.add_argument("--made", nargs="*", default=[], metavar="WHAT=PATH", help="paths to list below the table")
    options = words.parse_args(arguments)
    shortcuts = _shortcuts(options.shortcuts) if options.shortcuts else {}
    table = Table()
    for column in ("held out", "reached", "chance", "shortcuts reach"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for row in (*_evaluated(options.results, shortcuts), *_finetuned(options.finetuned)):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for what, _, path in (pair.partition("=") for pair in options.made):
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _evaluated(path: Path, shortcuts: dict) -> Iterator[tuple[str, ...]]:
    """Rows of the newest record of each task."""
    newest = {record["task"]: record for record in _records(path)}
    for task, metric, label in _SHOWN:
        record = newest.get(task)
        if record is not None:
            split, kind = _CEILINGS.get(task, ("", ""))
            best = max(shortcuts.get(split, {}).get(kind, {}).values(), default=None)
            yield label, _percent(record["metrics"][metric]), _percent(record["chance"].get(metric)), _percent(best)


def _finetuned(run: Path | None) -> Iterator[tuple[str, ...]]:
    if run is not None:
        last = [row for row in _records(run / "metrics.jsonl") if row["kind"] == "eval"][-1:]
        yield from (("fine-tuned classification, top-1", _percent(row["top1"]), "", "") for row in last)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _records(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(f"{path} cannot be read", got="no such file")
    return read_records(path)


def _shortcuts(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", got=str(error)) from None


if __name__ == "__main__":
    raise SystemExit(main())
