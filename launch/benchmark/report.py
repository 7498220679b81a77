"""What a benchmark leaves: a table on the terminal and one JSON file with everything needed to repeat it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.format.commit import atomic_write
from data_tools.redaction import redact_source
from pretrain.report.provenance import git_commit

_WIDE = 200  # columns


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of `values`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict:
    """What the figures were taken on."""
    import torch

    from pretrain.process.precision import cpu_has_bf16, processor

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "bf16_units": cpu_has_bf16(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def write_report(path: Path, report: dict) -> None:
    """Write `report` and its origin (command, commit, machine, torch) as strict JSON, whole or not at all."""
    import torch

    command = [redact_source(word) for word in sys.argv]
    origin = {"command": command, "commit": git_commit(), "machine": machine(), "torch": torch.__version__}
    report = report | origin
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=2, allow_nan=False, default=str) + "\n").encode())


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; the first column is text, the others stand to the right."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    print(title)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)  # a log file has no width that a cell would have to be cut for
    console.print(table)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 10 else _long(value)


def _long(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
