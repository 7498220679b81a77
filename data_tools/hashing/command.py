"""`python -m data_tools hash`: the column of hashes beside every shard."""

import argparse
import time

from data_tools.arguments import at_least
from data_tools.media import DEFAULT_CAPTIONS
from data_tools.parallel import available_cores

EXAMPLES = """examples:
  python -m data_tools hash shards/
  python -m data_tools hash 'laion/{00000..00099}.tar' --captions 'json:alt;txt'
  python -m data_tools hash shards/ && python -m data_tools dedup shards/

Beside every shard lies then SHARD.hash.parquet, a row a sample: the sha256 of the picture's bytes; a 64-bit hash of
what it looks like, which differs in few bits where a copy was compressed anew, resized, mirrored or framed; its size,
and the length of its longest caption. Shards stay as they are. What is up to date is kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("shards", nargs="+", help="packed folders, folders of tars, tars or patterns of tars")
    parser.add_argument(
        "--image", metavar="NAMES", help="members that hold the image, as in data.train.N.image (default: any known)"
    )
    parser.add_argument(
        "--captions", metavar="PLACES", help=f"as in data.train.N.captions (default: {DEFAULT_CAPTIONS})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Write the columns and print what became of the samples."""
    from data_tools.columns.make import make_column, open_local  # late: `--help` must answer at once
    from data_tools.hashing.maker import NAME, HashMaker
    from data_tools.media.members import fitting, parse_fields

    at_least(args, workers=1)
    started = time.monotonic()
    corpus = open_local(args.shards)
    fields = fitting(parse_fields(args.image, args.captions), corpus)
    made = make_column(corpus, HashMaker(fields), args.workers or available_cores())
    kept = f", {made.kept} of them from before" if made.kept else ""
    shards, seconds = made.shards + made.kept, time.monotonic() - started
    print(f"column {NAME} of {shards} shards{kept}, {made.samples} samples, in {seconds:.1f} s")
    if made.faults:
        counts = ", ".join(f"{kind} {count}" for kind, count in made.faults.items())
        print(f"without a hash of their looks: {counts}")
    return 0
