"""What a pack says when it ends: samples, classes with their counts, and why rows were skipped."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.compute as pc

from data_tools.build.accounts import PACKED, account_paths, read_account
from data_tools.build.run import Report
from data_tools.errors import shown
from data_tools.format.manifest import FILE_NAME
from data_tools.pack.labels import counted
from data_tools.pack.rows import Source, kinds_of

_MANY = 0.05  # a share of skipped rows above which the reasons are shown
_EXAMPLES = 3


def summarise(source: Source, report: Report, folder: Path, seconds: float) -> Iterator[str]:
    """The lines of the summary; of a pack that packed nothing only what was read and why all was skipped."""
    yield from map(shown, source.notes)
    skipped = sum(report.skipped.values())
    if report.samples:
        yield f"packed {report.samples} samples from {report.rows - skipped} of {report.rows} rows"
        yield from _classes(source, report, folder)
        yield f"skipped {skipped} rows{': ' if skipped else ''}{counts(report.skipped)}"
    if source.ignored:
        kinds = kinds_of(source.ignored)
        yield f"ignored {source.ignored.total()} files that are neither images nor text beside an image{kinds}"
    if report.samples:
        kept = f", {report.kept} of them from before" if report.kept else ""
        yield f"wrote {report.shards} shards{kept}, {report.bytes / 1e6:.1f} MB, in {seconds:.1f} s"
        yield str(folder / FILE_NAME)
    if skipped > _MANY * report.rows:
        yield from _reasons(report, folder)


def counts(skipped: dict[str, int]) -> str:
    """Skipped rows by error class."""
    return ", ".join(f"{name} {count}" for name, count in skipped.items())


def _classes(source: Source, report: Report, folder: Path) -> Iterator[str]:
    if source.labels is None:
        return
    labels: Counter[str] = Counter()
    captioned = 0
    for path in account_paths(folder):
        table = read_account(path, ["key", "status", "label", "captions"])
        packed = table.filter(pc.equal(table["status"], PACKED))
        lengths = pc.list_value_length(packed["captions"])
        samples = pyarrow.table({"key": packed["key"], "label": packed["label"], "captions": lengths})
        samples = samples.group_by(["key", "label"]).aggregate([("captions", "sum")])
        labels.update(samples["label"].to_pylist())
        captioned += pc.sum(pc.greater(samples["captions_sum"], 0)).as_py() or 0
    yield f"{len(source.labels)} classes: {counted(source.labels, labels)}"
    if captioned:
        yield f"{captioned} of {report.samples} samples have captions"


def _reasons(report: Report, folder: Path) -> Iterator[str]:
    """The error classes, most frequent first, with examples and the command for the whole list."""
    examples: dict[str, list[str]] = {name: [] for name in report.skipped}
    for path in account_paths(folder):
        if all(len(some) >= _EXAMPLES for some in examples.values()):
            break
        table = read_account(path, ["source", "error_class", "error"])
        for name, some in examples.items():
            for row in table.filter(pc.equal(table["error_class"], name)).slice(0, _EXAMPLES - len(some)).to_pylist():
                some.append(f"{shown(row['source'], 100)}: {shown(row['error'], 150)}")
    share = 100 * sum(report.skipped.values()) / report.rows
    yield f"{share:.0f} % of the rows were skipped:" if share >= 10 else f"{share:.1f} % of the rows were skipped:"
    for name, count in sorted(report.skipped.items(), key=lambda item: -item[1]):
        yield f"  {name} {count}, such as"
        yield from (f"    {example}" for example in examples[name])
    yield f"all of them: python -m data_tools rows {shown(folder)} --status skipped"
