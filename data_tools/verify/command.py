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
  python -m data_tools verify 'own/{00..09}.tar' --captions 'json:alt;txt' --decode 1

Checked: sizes and hashes against the manifest, the checksum of every tar header, the end of the archive, contiguous
samples, unique keys within and across shards, each index against its tar, each parquet; of every sample, that it has
an image and a caption or a label that training can read; and with --decode that its images are whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("shards", nargs="+", help="packed folders, folders of tars, tars or brace patterns")
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
        remedy = "pack or fetch the damaged shards again; `data_tools index` rewrites an index"
        raise UserError(f"problems: {len(problems)}, damaged shards: {damaged} of {len(reports)}", remedy=remedy)
    print("no problems")
    return 0


def _checks(args: argparse.Namespace) -> tuple[list, list[str]]:
    """The shards to check, and what is wrong between folder and manifest."""
    from data_tools.media.members import parse_fields
    from data_tools.shards.corpus import tar_paths
    from data_tools.shards.manifest import FILE_NAME, read_manifest
    from data_tools.verify.checks import ShardCheck

    fields = parse_fields(args.image, args.captions)
    checks, problems = [], []
    for source in args.shards:
        folder = Path(source).parent if Path(source).name == FILE_NAME else Path(source)
        if not folder.is_dir():
            checks += [ShardCheck(tar, None, args.decode, fields) for tar in tar_paths(source)]
            continue
        tars = {path.stem: path for path in sorted(folder.glob("*.tar"))}
        records, classes = {}, 0
        if (folder / FILE_NAME).exists():
            manifest = read_manifest(folder / FILE_NAME)
            records, classes = {record.name: record for record in manifest.shards}, len(manifest.classes)
            problems += [f"{tars[name]} is not in the manifest" for name in tars if name not in records]
        elif not tars:
            raise UserError(f"no {FILE_NAME} and no tars in {folder}", expected="a folder of shards")
        names = [*records, *(name for name in tars if name not in records)]
        checks += [
            ShardCheck(folder / f"{name}.tar", records.get(name), args.decode, fields, classes) for name in names
        ]
    return checks, problems
