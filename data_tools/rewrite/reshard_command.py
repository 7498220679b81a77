"""`python -m data_tools reshard`: options and the summary."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.arguments import at_least, check_shard_name
from data_tools.errors import UsageError
from data_tools.media import DEFAULT_CAPTIONS
from data_tools.parallel import available_cores

if TYPE_CHECKING:
    import numpy as np

    from data_tools.corpus import Corpus

EXAMPLES = """examples:
  python -m data_tools reshard shards/ larger/ --samples-per-shard 50000
  python -m data_tools reshard 'laion/{00000..00099}.tar' own/ --captions 'json:alt;txt'    # with accounts, verified
  python -m data_tools reshard shards/ subset/ --ids keys.txt
  python -m data_tools reshard 'datacomp/{00000..01287}.tar' subset/ --ids uids.npy --field uid
  python -m data_tools reshard shards/ rest/ --without taken_down.txt
  python -m data_tools dedup shards/ && python -m data_tools reshard shards/ clean/ --column dedup

Members are copied as they are, and nothing is decoded. An id is a sample's key, or the id that the account of a pack
tells (`rows --columns id`), or with --field what stands there in the sample's json; a file of ids has one a line, or is
a .npy of texts or of DataComp's pairs of 64-bit numbers. A sample whose key an earlier one has gets another. The same
command goes on where it was interrupted, and the same input gives the same bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.usage = "%(prog)s [options] shards [shards ...] output"
    parser.add_argument("shards", nargs="+", help="packed folders, folders of tars, tars or patterns of tars")
    parser.add_argument("output", type=Path, help="the folder for shards and manifest.json")
    chosen = parser.add_argument_group("which samples (default: all)").add_mutually_exclusive_group()
    chosen.add_argument("--ids", type=Path, metavar="FILE", help="those that the file names")
    chosen.add_argument("--without", type=Path, metavar="FILE", help="all but those that the file names")
    chosen.add_argument("--column", metavar="NAME", help="those whose sample_weight in this column is not 0")
    parser.add_argument("--field", metavar="NAME", help="of the json, in which ids stand; dots go deeper")
    parser.add_argument("--captions", metavar="PLACES", help=f"for accounts of foreign tars ({DEFAULT_CAPTIONS})")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--name", default="shard", help="shards are NAME-000000.tar and so on (default: shard)")
    shards.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="at most (default: 10000)")
    shards.add_argument("--shard-bytes", type=int, metavar="N", help="at most, but for a single sample of more")
    shards.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Write the shards and print what was taken."""
    _check(args)
    from data_tools.build.run import run_build  # late: `--help` must answer at once
    from data_tools.corpus import open_corpus
    from data_tools.format.manifest import FILE_NAME
    from data_tools.media.members import fitting, parse_fields
    from data_tools.rewrite.reshard import Cut, plan_reshard

    started = time.monotonic()
    workers = args.workers or available_cores()
    corpus = open_corpus(args.shards)
    chosen = _chosen(args, corpus, workers)
    cut = Cut(args.name, args.samples_per_shard, args.shard_bytes)
    plan = plan_reshard(corpus, chosen, cut, fitting(parse_fields(None, args.captions), corpus), args.output)
    report = run_build(plan.build, args.output, workers)
    print(f"took {plan.samples} of {corpus.num_samples} samples, and wrote {report.samples}")
    if plan.renamed:
        print(f"{plan.renamed} of them have another key: an earlier sample has theirs")
    if report.skipped:
        print(f"lost with damaged tars: {sum(report.skipped.values())}, listed by `rows --status skipped`")
    kept = f", {report.kept} of them from before" if report.kept else ""
    print(f"wrote {report.shards} shards{kept}, {report.bytes / 1e6:.1f} MB, in {time.monotonic() - started:.1f} s")
    print(args.output / FILE_NAME)
    return 0


def _check(args: argparse.Namespace) -> None:
    at_least(args, samples_per_shard=1, shard_bytes=1, workers=1)
    check_shard_name(args.name)
    if args.field and not (args.ids or args.without):
        raise UsageError("--field says where ids stand", remedy="--ids FILE or --without FILE as well")


def _chosen(args: argparse.Namespace, corpus: "Corpus", workers: int) -> "list[np.ndarray] | None":
    """The rows of each shard to take; None: all."""
    import numpy as np

    from data_tools.rewrite.ids import find_named, read_ids, say_named, weighted

    if args.column:
        return weighted(corpus, args.column)
    file = args.ids or args.without
    if file is None:
        return None
    ids = read_ids(file)
    named = find_named(corpus, ids, args.field, workers)
    say_named(ids, named)
    if args.ids:
        return named.rows
    return [np.setdiff1d(np.arange(count), rows) for count, rows in zip(corpus.counts, named.rows, strict=True)]
