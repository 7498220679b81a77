"""`python -m data_tools index`: the side-car of tars that other tools made."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from data_tools.errors import UserError
from data_tools.parallel import available_cores, run_tasks
from data_tools.progress import Progress
from data_tools.redaction import redact_source

EXAMPLES = """examples:
  python -m data_tools index laion/00000.tar
  python -m data_tools index 'datacomp/{00000000..00000127}.tar' --workers 8
  python -m data_tools index 's3://bucket/cc12m/{00000..01242}.tar'

Every header of a tar is checked, and that its samples are contiguous and their keys unique. A damaged tar is named with
the byte where the damage starts; it gets no index, the others do. Remote tars pass through the shard cache of this
machine, in $XDG_CACHE_HOME/dualstream or ~/.cache/dualstream, and their indexes are written beside them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("tars", nargs="+", help="tars or brace patterns of tars, or their URLs")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Index every tar that is sound; raises UserError when one is not."""
    from data_tools.remote.urls import expand_braces, is_remote
    from data_tools.shards.corpus import tar_paths  # late: `--help` must answer at once

    expanded = [expand_braces(source) if is_remote(source) else tar_paths(source) for source in args.tars]
    tars: list[Path | str] = list(dict.fromkeys(tar for some in expanded for tar in some))
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


def _index(tar: Path | str, advance: Callable[[int], None]) -> tuple[int, str | None]:
    advance(1)
    try:
        samples = _index_local(tar) if isinstance(tar, Path) else _index_remote(tar)
    except UserError as error:
        return 0, str(error)
    except OSError as error:
        return 0, f"cannot index {redact_source(str(tar))}: {error.strerror}"
    return samples, None


def _index_local(tar: Path) -> int:
    from data_tools.shards.index import build_index, index_path, write_index

    index = build_index(tar)
    _check_samples(index.num_samples, tar)
    write_index(index, index_path(tar))
    return index.num_samples


def _index_remote(url: str) -> int:
    from data_tools.remote.cache import Cache
    from data_tools.remote.settings import default_settings
    from data_tools.remote.store import write_bytes
    from data_tools.remote.urls import index_url
    from data_tools.shards.index import index_path

    settings = default_settings()
    cache = Cache(settings)
    samples, shard = cache.identify(url)
    _check_samples(samples, redact_source(url))
    lease = cache.lease(shard)
    try:
        write_bytes(index_url(url), index_path(lease.tar).read_bytes(), settings.limits)
    finally:
        os.close(lease.file)
    return samples


def _check_samples(samples: int, tar: object) -> None:
    if samples == 0:
        raise UserError(f"no samples in {tar}", expected="members named KEY.EXTENSION")
