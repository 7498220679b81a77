"""`python -m data_tools delete`: options and the summary."""

import argparse
import time
from pathlib import Path

from data_tools.arguments import at_least
from data_tools.errors import UserError
from data_tools.parallel import available_cores

EXAMPLES = """examples:
  python -m data_tools delete shards/ --ids taken_down.txt --dry-run
  python -m data_tools delete shards/ --ids taken_down.txt
  python -m data_tools delete shards/ --ids uids.npy --field uid

The shards that hold some of the samples are written anew without them, as SHARD-r1 and so on, and the old files are
removed. In the account their rows stay, as skipped, `deleted`, without captions, hashes and metadata. Columns of the
shards that changed are made anew by the verb that made them. An id is a sample's key, or the id that the account tells,
or with --field what stands there in its json. The folder is whole at any time; a killed command is finished by the same
one. A run that resumes on it is refused: its data is another. Of other tools' tars `reshard --without` makes a corpus
without them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("folder", type=Path, help="a packed folder")
    parser.add_argument("--ids", type=Path, required=True, metavar="FILE", help="one a line, or a .npy")
    parser.add_argument("--field", metavar="NAME", help="of the json, in which ids stand; dots go deeper")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and change nothing")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Take the samples out; raises UserError where no id names one."""
    at_least(args, workers=1)
    from data_tools.corpus import open_corpus  # late: `--help` must answer at once
    from data_tools.format.commit import exclusive
    from data_tools.rewrite.delete import deletion
    from data_tools.rewrite.ids import find_named, read_ids, say_named
    from data_tools.rewrite.swap import check_packed, exchange, finish

    started, workers = time.monotonic(), args.workers or available_cores()
    check_packed(args.folder, f"`python -m data_tools reshard {args.folder} OUTPUT --without FILE` makes one")
    ids = read_ids(args.ids)
    with exclusive(args.folder):
        corpus = open_corpus(args.folder)
        named = find_named(corpus, ids, args.field, workers)
        say_named(ids, named)
        request, count = deletion(args.folder, corpus, named.rows), sum(map(len, named.rows))
        if args.dry_run:
            print(f"would take {count} of {corpus.num_samples} samples out of {len(request.changes)} shards")
            return 0
        if not count:
            finish(args.folder)
            return _nothing(args, ids)
        left = exchange(request, workers).totals["samples"]
    seconds = time.monotonic() - started
    print(f"took {count} samples out of {len(request.changes)} shards, {left} stay, in {seconds:.1f} s")
    return 0


def _nothing(args: argparse.Namespace, ids: list[str]) -> int:
    """Where no sample is named: all was done before, or a mistake."""
    from data_tools.rewrite.delete import deleted_before

    before = deleted_before(args.folder, ids)
    if not before:
        raise UserError("no id names a sample", got=f"{len(ids)} ids", expected="keys, or ids of the account")
    print(f"{before} of them were taken out before")
    return 0
