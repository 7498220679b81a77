"""Making a column of a corpus: a shard is a task, what is up to date is kept, and the manifest learns of it last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import xxhash

from data_tools.columns.column import ERROR, ID, Footer, read_footer, remove_unfinished, write_column
from data_tools.corpus import Corpus, Sample, ShardReader, open_corpus
from data_tools.errors import UsageError
from data_tools.format.commit import exclusive, remove_temporaries
from data_tools.format.manifest import FILE_NAME, read_manifest, write_manifest
from data_tools.format.tar import TarDamageError
from data_tools.media.bad import BadSampleError
from data_tools.parallel import run_tasks
from data_tools.progress import Progress
from data_tools.redaction import redact_source
from data_tools.remote.urls import is_remote

_ADVANCE_EVERY = 32
LOST = "lost"  # a sample that its damaged tar no longer holds


class Maker(Protocol):
    """By what a column is made; it is pickled into worker processes."""

    @property
    def name(self) -> str:
        """Of the column."""

    @property
    def made_by(self) -> Mapping[str, object]:
        """What the values follow from, as JSON has it: another one makes the column anew."""

    @property
    def schema(self) -> pyarrow.Schema:
        """Of the values. Each may be null; `id` before them and `error` behind them are not the maker's."""

    def values(self, sample: Sample) -> dict[str, Any]:
        """The values of a sample by field, and at `error` the kind of a fault that left some of them out. Raises
        BadSampleError for a sample that has none."""


@dataclass(frozen=True)
class Made:
    """Shards that were computed, those kept from before, samples of all, and those with a fault by its kind."""

    shards: int
    kept: int
    samples: int
    faults: dict[str, int]


@dataclass(frozen=True)
class _Task:
    tar: Path
    samples: int
    footer: Footer
    maker: Maker


def open_local(sources: list[str]) -> Corpus:
    """The corpus that these name. Raises UsageError for a remote one: columns lie beside their shards."""
    for source in filter(is_remote, sources):
        raise UsageError(
            f"columns are written beside shards on this machine's disks, got {redact_source(source)}",
            remedy="copy the shards to this machine first",
        )
    return open_corpus(sources)


def make_column(corpus: Corpus, maker: Maker, workers: int) -> Made:
    """Write a column beside every shard of a local corpus. It may be killed at any point and run again; the bytes do
    not depend on the number of workers."""
    for folder in folders_of(corpus):
        remove_unfinished(folder, maker.name)
    tasks = []
    for number, path in enumerate(corpus.paths):
        footer = Footer(corpus.tar_hash(number).hex(), int(corpus.counts[number]), dict(maker.made_by))
        if not _same(read_footer(Path(path), maker.name), footer):
            tasks.append(_Task(Path(path), footer.samples, footer, maker))
    faults: Counter[str] = Counter()
    with Progress(maker.name, sum(task.samples for task in tasks), "samples") as progress:
        for found in run_tasks(_make_shard, tasks, workers, progress):
            faults.update(found)
    register(corpus, maker.name)
    return Made(len(tasks), len(corpus.paths) - len(tasks), corpus.num_samples, dict(sorted(faults.items())))


def folders_of(corpus: Corpus) -> list[Path]:
    """Those in which its shards lie."""
    return sorted({Path(path).parent for path in corpus.paths})


def register(corpus: Corpus, name: str) -> None:
    """Say in the manifests of its folders that all their shards have this column, made by one rule; where that is not
    so, that there is none."""
    for folder in folders_of(corpus):
        if (folder / FILE_NAME).exists():
            _register(folder, name)


def _register(folder: Path, name: str) -> None:
    with exclusive(folder):
        remove_temporaries(folder, FILE_NAME)
        manifest = read_manifest(folder / FILE_NAME)
        columns = {key: value for key, value in manifest.columns.items() if key != name}
        entry = _entry(folder, name, [(shard.name, shard.xxh3_128) for shard in manifest.shards if shard.samples])
        if entry is not None:
            columns[name] = entry
        if columns != manifest.columns:
            write_manifest(replace(manifest, columns=columns), folder)


def _entry(folder: Path, name: str, shards: list[tuple[str, str]]) -> dict | None:
    found: list[Footer] = []
    for shard, tar_hash in shards:
        footer = read_footer(folder / f"{shard}.tar", name)
        if footer is None or footer.tar_xxh3_128 != tar_hash or footer.made_by != (found or [footer])[0].made_by:
            return None
        found.append(footer)
    if not found:
        return None
    digest = xxhash.xxh3_128_hexdigest("".join(footer.values_xxh3_128 for footer in found).encode())
    return {"made_by": found[0].made_by, "values_xxh3_128": digest}


def _same(found: Footer | None, wanted: Footer) -> bool:
    return found is not None and replace(found, values_xxh3_128="") == wanted


def _make_shard(task: _Task, advance: Callable[[int], None]) -> Counter[str]:
    """Compute and commit the column of one shard; returns its faults by kind."""
    fields = [ID, *task.maker.schema, ERROR]
    rows: list[dict[str, Any]] = []
    with ShardReader(open_corpus(task.tar)) as reader:
        for number in range(task.samples):
            rows.append({ID.name: reader.sample_id(0, number), **_values(reader, number, task.maker)})
            if len(rows) % _ADVANCE_EVERY == 0:
                advance(_ADVANCE_EVERY)
    advance(len(rows) % _ADVANCE_EVERY)
    write_column(task.tar, task.maker.name, task.footer, pyarrow.Table.from_pylist(rows, pyarrow.schema(fields)))
    return Counter(row[ERROR.name] for row in rows if row.get(ERROR.name))


def _values(reader: ShardReader, number: int, maker: Maker) -> dict[str, Any]:
    try:
        return maker.values(reader.read(0, number))
    except BadSampleError as error:
        return {ERROR.name: error.kind}
    except TarDamageError:
        return {ERROR.name: LOST}
