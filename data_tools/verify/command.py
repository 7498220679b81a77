"""`python -m data_tools verify`: options, what to check, and the report."""

import argparse
import time
from pathlib import Path

from data_tools.errors import SHOWN, UsageError, UserError, shown
from data_tools.media import DEFAULT_CAPTIONS
from data_tools.parallel import available_cores, run_tasks
from data_tools.progress import Progress

EXAMPLES = """examples:
  python -m data_tools verify shards/
  python -m data_tools verify shards/ --decode 0.01          # and decode one image in a hundred
  python -m data_tools verify 'laion/{00000..00099}.tar'     # tars of another tool
  python -m data_tools verify laion/                         # all tars of a folder, or of its folders
  python -m data_tools verify 'own/{00..09}.tar' --captions 'json:alt;txt' --decode 1

Checked: sizes, hashes and totals of the manifest, the checksum of every tar header, the end of the archive, contiguous
samples, unique keys within and across shards, each index against its tar, each parquet; of every sample, that it has
an image and a caption or a label that training can read (in a shard of texts alone, a caption); and with --decode that
its images are whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("shards", nargs="+", help="packed folders, folders of tars, tars or patterns of tars")
    parser.add_argument("--decode", type=float, default=0.0, metavar="SHARE", help="share of images to decode, 0 to 1")
    parser.add_argument(
        "--image", metavar="NAMES", help="members that hold the image, as in data.train.N.image (default: any known)"
    )
    parser.add_argument(
        "--captions", metavar="PLACES", help=f"as in data.train.N.captions (default: {DEFAULT_CAPTIONS})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Check the shards and print every problem; raises UserError when there is one."""
    if not 0 <= args.decode <= 1:
        raise UsageError("--decode is not a share", got=args.decode, expected="0 to 1")
    from data_tools.verify.checks import check_shard, duplicate_keys  # late: `--help` must answer at once

    started = time.monotonic()
    checks, problems = _checks(args)
    with Progress("verifying", len(checks), "shards") as progress:
        reports = list(run_tasks(check_shard, checks, args.workers or available_cores(), progress))
    reports.sort(key=lambda report: report.tar)
    problems += [problem for report in reports for problem in report.problems]
    problems += duplicate_keys(reports)
    for problem in problems:
        print(shown(problem, 4 * SHOWN))
    samples = sum(len(report.key_hashes) for report in reports if report.key_hashes is not None)
    decoded = sum(report.decoded for report in reports)
    seconds = time.monotonic() - started
    print(f"verified {len(reports)} shards, {samples} samples, {decoded} images decoded, in {seconds:.1f} s")
    if problems:
        damaged = sum(bool(report.problems) for report in reports)
        remedy = (
            "pack or fetch shards again where they are damaged, or let `data_tools repair` keep what is whole (`index` "
            "of other tools' tars); training replaces bad samples, up to data.max_bad_ratio of them"
        )
        raise UserError(f"problems: {len(problems)}, damaged shards: {damaged} of {len(reports)}", remedy=remedy)
    print("no problems")
    return 0


def _checks(args: argparse.Namespace) -> tuple[list, list[str]]:
    """The shards to check, each once, and what is wrong between folder and manifest."""
    from data_tools.corpus.sources import find, natural
    from data_tools.format.manifest import read_manifest, wrong_totals
    from data_tools.media.members import parse_fields
    from data_tools.redaction import redact_source
    from data_tools.remote.urls import is_remote
    from data_tools.verify.checks import ShardCheck

    for source in filter(is_remote, args.shards):
        remedy = "copy it to this machine first; training checks what it fetches by itself"
        raise UsageError(f"verify reads this machine's disks, got {redact_source(source)}", remedy=remedy)
    fields = parse_fields(args.image, args.captions)
    checks: dict[Path, ShardCheck] = {}
    problems = []
    for found in (found for source in args.shards for found in find(source, splits=True)):
        records, tars, classes = {}, found.tars, len(found.classes)
        if found.manifest:
            manifest, folder = read_manifest(found.manifest), found.manifest.parent
            records = {folder / f"{record.name}.tar": record for record in manifest.shards}
            strange = [tar for tar in sorted(folder.glob("*.tar"), key=natural) if tar not in records]
            problems += [f"{tar} is not in the manifest" for tar in strange]
            problems += [f"{found.manifest}: {fault}" for fault in wrong_totals(manifest)]
            tars, classes = (*records, *strange), len(manifest.classes)
        for tar in tars:
            checks.setdefault(tar, ShardCheck(tar, records.get(tar), args.decode, fields, classes))
    return list(checks.values()), problems
