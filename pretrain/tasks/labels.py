"""The labels of a fine-tune: what the classes are called, and that there is something to tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from data_tools.corpus import Corpus, ShardReader
from data_tools.errors import UsageError, UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import label
from data_tools.progress import Progress
from pretrain.evaluate.classes import shown
from pretrain.evaluate.templates import load_classes
from pretrain.process.collectives import raise_on_all_ranks
from pretrain.process.runtime import Runtime
from pretrain.stream.loader import StreamSource
from pretrain.stream.samples import read_sample

_PROBES = 256  # places all over a corpus that are looked at before the whole of it


def set_classes(sources: Sequence[StreamSource], setting: object) -> list[StreamSource]:
    """The sources with the class names of the setting `classes`, or with those that their shards were packed with.

    Raises:
        UserError: no names anywhere, other counts in different places, fewer than two classes.
    """
    packed = {source.corpus.classes for source in sources if source.corpus.classes}
    if len(packed) > 1:
        first, other = sorted(packed)[:2]
        raise UserError(
            "the training corpora have different classes",
            got=shown(other),
            expected=shown(first),
            remedy="pack them from one table, or with the same folders, so that equal labels mean equal classes",
        )
    known = next(iter(packed), ())
    given = read_classes(setting)
    if given and known and len(given) != len(known):
        raise UserError(
            "the setting classes does not fit the training corpus",
            got=f"{len(given)} classes",
            expected=f"the {len(known)} that it was packed with: {shown(known)}",
        )
    names = given or known
    if not names:
        raise UserError(
            "the training corpus names no classes",
            expected="shards packed with labels, or the setting classes",
            remedy="classes=FILE (one name a line, in the order of the labels), classes='[cat,dog]' or classes=COUNT; "
            "or pack with --labels folder or --label-column",
        )
    if len(names) < 2:
        raise UserError(
            "the training corpus has one class, so there is nothing to learn",
            got=shown(names),
            expected="two classes or more",
            remedy="pack the images of the other classes too",
        )
    return [replace(source, corpus=replace(source.corpus, classes=names)) for source in sources]


def read_classes(setting: object) -> tuple[str, ...]:
    """The class names of the setting `classes`: a list of names, a count (they are then called 0, 1, ...), or a file
    with a name a line; () for null. Raises UsageError or UserError where that is none, or a name stands twice."""
    if setting is None:
        return ()
    if is_count(setting):
        return tuple(map(str, range(int(str(setting)))))
    names = load_classes(Path(setting)) if isinstance(setting, str) else tuple(map(str, cast(Iterable, setting)))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError("the setting classes has a name twice", got=shown([twice]), expected="each name once")
    return names


def is_count(setting: object) -> bool:
    """Whether the setting `classes` says only how many there are."""
    return str(setting).isdecimal()


def check_labels(sources: Sequence[StreamSource], runtime: Runtime) -> None:
    """Raises UserError on every rank where all labels of all sources are one, or some have no class. All ranks must
    call it.

    Two labels are found at once unless a corpus is sorted or one class is rare; then the rest is read.
    """
    raise_on_all_ranks((lambda: _two_labels(sources)) if runtime.is_main else lambda: None, "looking at the labels")


def _two_labels(sources: Sequence[StreamSource]) -> None:
    corpora = [source.corpus for source in sources]
    local = [corpus for corpus in corpora if corpus.cache is None]  # remote shards would all be fetched for a look
    found = {number for corpus in local for number in _labels(corpus, _spread(corpus.num_samples))}
    _refuse_nameless(found, corpora[0].classes)
    total = sum(corpus.num_samples for corpus in corpora)
    if len(found) < 2:
        with Progress("looking for a second class", total, "samples") as bar:
            everywhere = (number for corpus in corpora for number in _labels(corpus, range(corpus.num_samples)))
            found = _distinct(everywhere, bar)
    if len(found) != 1:
        return  # without any readable label the stream says what is wrong with the samples
    first, names = found.pop(), corpora[0].classes
    called = f"{first} ({shown([names[first]])})" if first < len(names) else str(first)
    raise UserError(
        "all labels of the training corpus are equal, so there is nothing to learn",
        got=f"label {called} in all of {total} samples",
        expected="samples of two classes or more",
        remedy="look at the corpus with `python -m data_tools preview`; pack the images of the other classes too",
    )


def _refuse_nameless(found: set[int], names: Sequence[str]) -> None:
    """Raises UserError where a label is not the number of a class: such samples would only be counted as bad."""
    highest = max(found, default=0)
    if highest >= len(names):
        raise UserError(
            "the training corpus has labels without a class name",
            got=f"label {highest}, and {len(names)} classes: {shown(names)}",
            expected=f"labels 0 to {len(names) - 1}",
            remedy="name all of them, in the order of the labels, with the setting classes",
        )


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, _PROBES).astype(int).tolist()


def _distinct(labels: Iterator[int], bar: Progress | None = None) -> set[int]:
    """The first two different ones, or what there is."""
    found: set[int] = set()
    for done, number in enumerate(labels, 1):
        found.add(number)
        if len(found) == 2:
            break
        if bar is not None:
            bar.update(done)
    return found


def _labels(corpus: Corpus, positions: Sequence[int]) -> Iterator[int]:
    """Labels at the positions of the corpus; those that cannot be read are left out."""
    with ShardReader(corpus) as reader:
        for position in positions:
            with suppress(BadSampleError):
                yield label(read_sample(reader, *corpus.locate(position)))
