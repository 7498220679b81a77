"""`python -m data_tools repair`: options and the summary."""

import argparse
import time
from pathlib import Path

from data_tools.arguments import at_least
from data_tools.errors import shown
from data_tools.parallel import available_cores

EXAMPLES = """examples:
  python -m data_tools repair shards/ --dry-run       # which shards, and why
  python -m data_tools repair shards/
  python -m data_tools rows shards/ --where error_class=lost

Of a damaged shard of a packed folder a new one is written, SHARD-r1 and so on, of the samples that are still what the
account says: the picture by its sha256, the captions word by word. The others are lost: their rows stay in the account,
with the reason. The old files go to shards/damaged/. A shard that is whole is not touched; where its index alone is
damaged, that is written anew. Where the input of the pack is still there, packing again brings back all: delete the
damaged tar and run the same pack. Of other tools' tars `index` keeps what is whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("folder", type=Path, help="a packed folder")
    parser.add_argument("--dry-run", action="store_true", help="say what is damaged, and change nothing")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Repair what is damaged; the exit code is 1 where a dry run finds damage."""
    at_least(args, workers=1)
    from data_tools.format.commit import exclusive  # late: `--help` must answer at once
    from data_tools.format.manifest import FILE_NAME, read_manifest
    from data_tools.rewrite.repair import KEPT_IN, find_damage, mend_indexes, repair
    from data_tools.rewrite.swap import check_packed, exchange, finish

    started, workers = time.monotonic(), args.workers or available_cores()
    check_packed(args.folder, "of other tools' tars `python -m data_tools index` keeps what is whole")
    with exclusive(args.folder):
        findings = find_damage(args.folder, workers)
        for finding in findings:
            print(f"{shown(finding.name)}: {shown(finding.reason)}")
        if args.dry_run:
            print(f"{len(findings)} damaged shards")
            return int(bool(findings))
        before = read_manifest(args.folder / FILE_NAME).totals.get("samples", 0)
        mend_indexes(args.folder, findings)
        request = repair(args.folder, findings)
        if request.changes:
            left = exchange(request, workers).totals["samples"]
            print(f"{before - left} samples are lost, {left} stay; the old files are in {args.folder / KEPT_IN}")
        else:
            finish(args.folder)
    indexes = len(findings) - len(request.changes)
    print(f"repaired {len(request.changes)} shards and {indexes} indexes, in {time.monotonic() - started:.1f} s")
    return 0
