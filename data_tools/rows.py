"""`python -m data_tools rows`: what became of every input row of a pack, as a table."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UsageError, shown
from data_tools.listing import check_output, text_of, write_rows

EXAMPLES = """examples:
  python -m data_tools rows shards/ --status skipped                 # which rows were left out, and why
  python -m data_tools rows shards/ --where error_class=undecodable --limit 500
  python -m data_tools rows shards/ --columns source,label,width,height --where label=cat
  python -m data_tools rows shards/ --status skipped --output skipped.csv

`pack` keeps one row per input row, packed or skipped, in the .parquet beside each shard."""

_DEFAULT = ("source", "status", "error_class", "error", "label", "captions")
_WIDTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("folder", type=Path, help="a packed folder")
    parser.add_argument("--status", choices=["packed", "skipped"], help="these rows only")
    parser.add_argument(
        "--where", metavar="COLUMN=VALUE", action="append", help="keep these rows only; repeat for more"
    )
    parser.add_argument("--columns", metavar="NAMES", help="which, with commas (default: those that are not empty)")
    parser.add_argument("--limit", type=int, metavar="N", help="rows to show (default: 50, or all with --output)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write them all to a .csv or .jsonl instead")


def run(args: argparse.Namespace) -> int:
    """Show or write the rows; raises UserError where the folder has no account of rows."""
    from data_tools.build.accounts import SCHEMA, read_accounts  # late: `--help` must answer at once

    if args.limit is not None and args.limit <= 0:
        raise UsageError("--limit is not positive", got=args.limit)
    if args.output:
        check_output(args.output)
    columns = args.columns.split(",") if args.columns else None
    wanted = dict(_pair(pair) for pair in args.where or ())
    for name in [*(columns or ()), *wanted]:
        if name not in SCHEMA.names:
            raise UsageError(f"no column {name!r}", expected=", ".join(SCHEMA.names))
    if args.status:
        wanted["status"] = args.status
    rows = (row for row in read_accounts(args.folder) if all(text_of(row[name]) == wanted[name] for name in wanted))
    if args.output:
        count = write_rows(args.output, columns or SCHEMA.names, itertools.islice(rows, args.limit))
        print(f"wrote {count} rows to {shown(args.output)}")
        return 0
    limit = args.limit or 50
    found = list(itertools.islice(rows, limit))
    for line in _table(found, columns or [name for name in _DEFAULT if any(row[name] for row in found)]):
        print(line)
    more = sum(1 for _ in rows)
    print(f"{len(found)} rows" if not more else f"{limit} of {limit + more} rows; --limit N shows more, --output all")
    return 0


def _pair(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise UsageError("bad --where", got=pair, expected="COLUMN=VALUE")
    return name, value


def _table(rows: list[dict], columns: list[str]) -> Iterator[str]:
    """Lines of a table with a header; every cell on one line, cut where it is long."""
    cells = [[shown(text_of(row[name]), _WIDTH) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells] if rows else []:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
