"""`python -m data_tools index`: the side-car of tars that other tools made, and what was found in them."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UserError
from data_tools.parallel import available_cores, run_tasks
from data_tools.progress import Progress
from data_tools.redaction import redact_source

if TYPE_CHECKING:  # late otherwise: `--help` must answer at once
    from data_tools.format.index import Index

EXAMPLES = """examples:
  python -m data_tools index laion/00000.tar
  python -m data_tools index laion/                          # all tars of a folder, or of its folders (train/, test/)
  python -m data_tools index 'datacomp/{00000000..00000127}.tar' --workers 8
  python -m data_tools index 's3://bucket/cc12m/{00000..01242}.tar'

Every header of a tar is checked, and that its samples are contiguous and their keys unique. A damaged tar is named with
the byte where the damage starts, and what is whole in it is indexed: training replaces and counts the samples that are
known to be lost, evaluation refuses them, and this command ends with exit code 1. Files that are no samples, such as a
README.txt, are passed over. Remote tars pass through the shard cache of this machine, in $XDG_CACHE_HOME/dualstream or
~/.cache/dualstream, and their indexes are written beside them."""

_KINDS, _NAMES = 12, 3  # shown in the summary
_CAPTIONS = ("on one line", "on several lines", "empty")
_MAX_TEXT = 1 << 16  # bytes of a caption that are looked at


@dataclass
class _Result:
    """What was found in a tar, or in all of them; `fault` is why one has no index."""

    samples: int = 0
    lost: int = 0
    members: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    passed: int = 0
    passed_names: list[str] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)
    fault: str | None = None

    def add(self, other: _Result) -> None:
        """Count what was found in another tar."""
        self.samples, self.lost = self.samples + other.samples, self.lost + other.lost
        self.members.update(other.members)
        self.captions.update(other.captions)
        self.passed += other.passed
        self.passed_names += other.passed_names
        self.damages += other.damages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("tars", nargs="+", help="tars, folders of tars or patterns of tars, or URLs of tars")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Index every tar and say what was found; raises UserError when one is damaged or cannot be indexed."""
    tars = list(dict.fromkeys(tar for source in args.tars for tar in _tars(source)))
    total, faults, damaged = _Result(), [], 0
    with Progress("indexing", len(tars), "tars") as progress:
        for result in run_tasks(_index, tars, args.workers or available_cores(), progress):
            total.add(result)
            faults += [result.fault] if result.fault else []
            damaged += bool(result.damages)
    lost = f", {total.lost} of them lost" if total.lost else ""
    print(f"indexed {len(tars) - len(faults)} of {len(tars)} tars, {total.samples} samples{lost}")
    for line in (*_summary(total), *sorted(total.damages), *sorted(faults)):
        print(line)
    if faults:
        raise UserError(f"{len(faults)} of {len(tars)} tars have no index", remedy="see above what to do about each")
    if damaged:
        raise UserError(
            f"{damaged} of {len(tars)} tars are damaged",
            got=f"at least {total.lost} of {total.samples} samples lost",
            remedy="fetch these tars again; or train on what is left, which is indexed, and see the lost replaced",
        )
    return 0


def _tars(source: str) -> list[Path] | list[str]:
    from data_tools.corpus.sources import find
    from data_tools.format.manifest import read_manifest
    from data_tools.remote.urls import expand_braces, is_remote

    if is_remote(source):
        return expand_braces(source)
    tars: list[Path] = []
    for found in find(source, splits=True):
        tars += found.tars
        if found.manifest:
            tars += [found.manifest.parent / f"{record.name}.tar" for record in read_manifest(found.manifest).shards]
    return tars


def _summary(total: _Result) -> list[str]:
    """What was found: members by extension, captions by lines, files that are no samples."""
    lines = []
    if total.members:
        kinds = [f"{count} {name}" for name, count in total.members.most_common(_KINDS)]
        more = len(total.members) - len(kinds)
        hint = f" and {more} more kinds (a key ends at the first dot of a file's name)" if more else ""
        lines.append(f"members: {', '.join(kinds)}{hint}")
    if total.captions:
        kinds = [f"{total.captions[name]} {name}" for name in _CAPTIONS if total.captions[name]]
        lines.append(f"captions (.txt): {', '.join(kinds)}")
    if total.passed:
        names = ", ".join(total.passed_names[:_NAMES])
        lines.append(f"passed over: {total.passed} files that are no part of a sample, such as {names}")
    return lines


def _index(tar: Path | str, advance: Callable[[int], None]) -> _Result:
    try:
        return _index_local(tar) if isinstance(tar, Path) else _index_remote(tar)
    except UserError as error:
        return _Result(fault=str(error))
    except OSError as error:
        return _Result(fault=f"cannot index {redact_source(str(tar))}: {error.strerror}")
    finally:
        advance(1)


def _index_local(tar: Path) -> _Result:
    from data_tools.errors import shown
    from data_tools.format.index import index_path, write_index
    from data_tools.format.survey import survey_tar

    survey = survey_tar(tar)
    result = _found(tar, survey.index)
    _check_samples(result.samples, tar)
    write_index(survey.index, index_path(tar))
    result.passed, result.passed_names = survey.passed, [shown(name, 60) for name in survey.passed_names]
    result.damages = survey.describe_losses(tar)
    return result


def _index_remote(url: str) -> _Result:
    from data_tools.format.index import index_path, open_index
    from data_tools.remote.cache import Cache
    from data_tools.remote.settings import default_settings
    from data_tools.remote.store import write_bytes
    from data_tools.remote.urls import index_url

    settings = default_settings()
    cache = Cache(settings)
    samples, shard = cache.identify(url)
    _check_samples(samples, redact_source(url))
    lease = cache.lease(shard)
    try:
        path = index_path(lease.tar)
        write_bytes(index_url(url), path.read_bytes(), settings.limits)
        result = _found(lease.tar, open_index(path))
    finally:
        os.close(lease.file)
    if result.lost:
        result.damages = [f"damaged tar {redact_source(url)}: at least {result.lost} of {samples} samples lost"]
    return result


def _found(tar: Path, index: Index) -> _Result:
    """Members by extension, and captions by how many lines they have."""
    import numpy as np

    from data_tools.format.files import opened

    counts = np.bincount(index.members[:, 0], minlength=len(index.extensions)).tolist()
    members = Counter(dict(zip(index.extensions, counts, strict=True)))
    result = _Result(index.num_samples, index.lost, members)
    if "txt" not in members:
        return result
    rows = np.flatnonzero(index.members[:, 0] == index.extensions.index("txt"))
    samples = np.searchsorted(index.first_member, rows, "right") - 1
    starts = index.offsets[samples] + index.members[rows, 1]
    with opened(tar) as file:
        for start, size in zip(starts.tolist(), index.members[rows, 2].tolist(), strict=True):
            result.captions[_lines(os.pread(file, min(size, _MAX_TEXT), start))] += 1
    return result


def _lines(data: bytes) -> str:
    from data_tools.media.captions import lines_of

    lines = len(lines_of(data.decode("utf-8", "replace")))
    return _CAPTIONS[lines != 1] if lines else "empty"


def _check_samples(samples: int, tar: object) -> None:
    if samples == 0:
        raise UserError(f"no samples in {tar}", expected="members named KEY.EXTENSION", remedy="leave this tar out")
