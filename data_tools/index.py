"""`python -m data_tools index`: the side-car of tars that other tools made."""

import argparse
from collections.abc import Callable
from pathlib import Path

from data_tools.errors import UserError
from data_tools.parallel import available_cores, run_tasks
from data_tools.progress import Progress

EXAMPLES = """examples:
  python -m data_tools index laion/00000.tar
  python -m data_tools index 'datacomp/{00000000..00000127}.tar' --workers 8

Every header of a tar is checked, and that its samples are contiguous and their keys unique. A damaged tar is named with
the byte where the damage starts; it gets no index, the others do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("tars", nargs="+", help="tars or brace patterns of tars")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Index every tar that is sound; raises UserError when one is not."""
    from data_tools.shards.corpus import tar_paths  # late: `--help` must answer at once

    tars = list(dict.fromkeys(path for url in args.tars for path in tar_paths(url)))
    samples, faults = 0, []
    with Progress("indexing", len(tars), "tars") as progress:
        for count, fault in run_tasks(_index, tars, args.workers or available_cores(), progress):
            samples += count
            faults += [fault] if fault else []
    print(f"indexed {len(tars) - len(faults)} of {len(tars)} tars, {samples} samples")
    for fault in sorted(faults):
        print(fault)
    if faults:
        raise UserError(
            f"{len(faults)} of {len(tars)} tars have no index", remedy="fetch these tars again or leave them out"
        )
    return 0


def _index(tar: Path, advance: Callable[[int], None]) -> tuple[int, str | None]:
    from data_tools.shards.index import build_index, index_path, write_index

    advance(1)
    try:
        index = build_index(tar)
        if index.num_samples == 0:
            raise UserError(f"no samples in {tar}", expected="members named KEY.EXTENSION")
        write_index(index, index_path(tar))
    except UserError as error:
        return 0, str(error)
    except OSError as error:
        return 0, f"cannot index {tar}: {error.strerror}"
    return index.num_samples, None
