"""`python -m data_tools split`: options and the summary."""

import argparse
import time
from pathlib import Path

from data_tools.arguments import at_least, check_shard_name
from data_tools.errors import UserError, shown
from data_tools.media import DEFAULT_CAPTIONS
from data_tools.parallel import available_cores

EXAMPLES = """examples:
  python -m data_tools split shards/ parts/ --shares train=0.98,val=0.02
  python -m data_tools split shards/ parts/ --field split        # as the json of each sample says
  python -m data_tools split 'laion/{00000..00099}.tar' parts/ --shares train=0.9,val=0.1 --seed 1

Every part is a packed folder, parts/train and so on. By --shares a sample falls where a hash of its picture does:
samples of one picture, to the byte, are in one part, and those of a corpus that has grown stay where they were. Members
are copied as they are, and nothing is decoded. The same command goes on where it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.usage = "%(prog)s [options] shards [shards ...] output"
    parser.add_argument("shards", nargs="+", help="packed folders, folders of tars, tars or patterns of tars")
    parser.add_argument("output", type=Path, help="the folder for a folder of each part")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--shares", metavar="NAME=SHARE,...", help="parts, and the share of samples that each takes")
    rule.add_argument("--field", metavar="NAME", help="of the json, which names the part; dots go deeper")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn by --shares (default: 0)")
    parser.add_argument("--captions", metavar="PLACES", help=f"for accounts of foreign tars ({DEFAULT_CAPTIONS})")
    parser.add_argument("--name", default="shard", help="shards are NAME-000000.tar and so on (default: shard)")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="at most (default: 10000)")
    parser.add_argument("--shard-bytes", type=int, metavar="N", help="at most, but for a single sample of more")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Write the parts and print what each holds."""
    at_least(args, samples_per_shard=1, shard_bytes=1, workers=1, seed=0)
    check_shard_name(args.name)
    from data_tools.build.run import run_build  # late: `--help` must answer at once
    from data_tools.corpus import open_corpus
    from data_tools.media.members import fitting, parse_fields
    from data_tools.rewrite.reshard import Cut, plan_reshard
    from data_tools.rewrite.split import Shares, Told, assign, parse_shares

    started, workers = time.monotonic(), args.workers or available_cores()
    shares = parse_shares(args.shares) if args.shares else None
    corpus = open_corpus(args.shards)
    fields = fitting(parse_fields(None, args.captions), corpus)
    parts = assign(corpus, Shares(*shares, args.seed, fields) if shares else Told(args.field), workers)
    for name, rows in parts.items():
        _check(name, sum(map(len, rows)), corpus.num_samples)
    cut, total = Cut(args.name, args.samples_per_shard, args.shard_bytes), 0
    for name, rows in parts.items():
        folder = args.output / name
        report = run_build(plan_reshard(corpus, rows, cut, fields, folder).build, folder, workers)
        share, total = 100 * report.samples / corpus.num_samples, total + report.samples
        print(f"{shown(name)}: {report.samples} samples ({share:.2f} %) in {report.shards} shards, {shown(folder)}")
    lost = corpus.num_samples - total
    print(f"{total} of {corpus.num_samples} samples{f', {lost} lost with damaged tars' if lost else ''}", end="")
    print(f", in {time.monotonic() - started:.1f} s")
    return 0


def _check(name: str, samples: int, total: int) -> None:
    """Raises UserError before anything is written for a part that cannot be a folder, or would be empty."""
    if set(name) & set("/\\\0") or name.startswith(".") or len(name.encode()) > 200:
        raise UserError("a part cannot be a folder of that name", got=name, expected="a name without slashes")
    if not samples:
        raise UserError(f"no sample falls into {name}", got=f"{total} samples in all", remedy="give it a larger share")
