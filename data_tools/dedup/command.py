"""`python -m data_tools dedup`: options, the column of what goes, the list, and the summary."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.arguments import at_least
from data_tools.errors import UsageError, UserError
from data_tools.parallel import available_cores

if TYPE_CHECKING:
    from data_tools.dedup.find import Search

EXAMPLES = """examples:
  python -m data_tools hash shards/ && python -m data_tools dedup shards/
  python -m data_tools dedup shards/ --dry-run                # how many, and nothing is written
  python -m data_tools dedup shards/ --radius 3               # copies alone that differ in 3 of 64 bits at most
  python -m data_tools dedup shards/ --output copies.csv      # which go, and for which
  python -m data_tools dedup 'a-{00..99}.tar' 'b-{00..49}.tar'

Pictures are copies whose hashes differ in --radius bits or fewer, the mirrored picture's too, and of those without a
hash the ones of the same bytes. Of copies the one of the most pixels stays, then the one with the longest caption, then
the first. Each that goes is within the radius of the one that stays for it. Beside every shard lies then
SHARD.dedup.parquet: sample_weight, 0 of what goes; the shard (by its hash), row and id of what stays; the distance."""

_PATIENCE = 1800.0  # seconds, beyond which a search is begun on request alone
_RADIUS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("shards", nargs="+", help="corpora that have the column of hashes; they are searched as one")
    parser.add_argument(
        "--radius", type=int, default=_RADIUS, metavar="BITS", help=f"of 64, at most (default: {_RADIUS})"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="list what goes in a .csv or .jsonl as well")
    parser.add_argument("--dry-run", action="store_true", help="write no columns")
    parser.add_argument("--yes", action="store_true", help="begin however long it will take")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Search, write the columns, and print what goes."""
    from data_tools.columns.make import open_local  # late: `--help` must answer at once
    from data_tools.dedup.find import Search, same_bytes
    from data_tools.dedup.near import MAX_RADIUS
    from data_tools.dedup.pictures import read_pictures
    from data_tools.dedup.write import write_columns, write_list
    from data_tools.listing import check_output

    at_least(args, workers=1)
    if not 0 <= args.radius <= MAX_RADIUS:
        raise UsageError("--radius is out of range", got=args.radius, expected=f"0 to {MAX_RADIUS}")
    if args.output:
        check_output(args.output)
    started = time.monotonic()
    workers = args.workers or available_cores()
    corpus = open_local(args.shards)
    search = Search(read_pictures(corpus), args.radius)
    _ask(search, args, workers)
    goes = search.run(workers)
    same = same_bytes(corpus, goes)
    if args.output:
        write_list(args.output, corpus, goes, same)
    if not args.dry_run:
        write_columns(corpus, goes, same, args.radius)
    alike, left = len(same) - same.sum(), corpus.num_samples - len(same)
    seconds = time.monotonic() - started
    print(f"{corpus.num_samples} samples: {same.sum()} of the same bytes and {alike} alike go, {left} stay", end="")
    print(f", in {seconds:.1f} s")
    return 0


def _ask(search: "Search", args: argparse.Namespace, workers: int) -> None:
    seconds = search.plan.seconds / workers
    if seconds > _PATIENCE and not args.yes:
        raise UserError(
            f"a radius of {args.radius} among {search.different:,} different hashes takes long",
            got=f"about {search.plan.candidates:.1g} pairs to compare, {seconds / 3600:.1f} hours on {workers} workers",
            remedy="a smaller --radius, or --yes",
        )
