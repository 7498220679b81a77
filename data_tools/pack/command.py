"""`python -m data_tools pack`: options, and the summary."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.arguments import check_shard_name
from data_tools.errors import UsageError, UserError
from data_tools.media import MAX_PIXELS
from data_tools.parallel import available_cores

EXAMPLES = """examples:
  python -m data_tools pack photos/ shards/                           # images with .txt or .json beside them
  python -m data_tools pack captions.csv shards/ --where split=train  # a table: columns image and caption
  python -m data_tools pack pairs.tsv shards/ --image-column filepath --caption-column title --image-root photos/
  python -m data_tools pack flowers/ shards/ --labels folder          # one sub-folder per class
  python -m data_tools pack labels.csv shards/ --label-column label
  python -m data_tools pack coco/annotations/captions_val2017.json shards/                # pictures in coco/val2017/
  python -m data_tools pack dataset_flickr8k.json shards/ --where split=train --image-root Flicker8k_Dataset/
  python -m data_tools pack saved/ shards/ --where split=train        # of Hugging Face's save_to_disk
  python -m data_tools pack train.parquet shards/ --image-column img  # with the pictures in it
  python -m data_tools pack raw.csv shards/ --quotes none             # where a double quote is a mere character
  python -m data_tools rows shards/ --status skipped                  # which rows were left out, and why

Rows of one image become one sample with all their captions. Pictures keep their bytes; of several formats all are
stored as KEY.jpg, since readers want one name and go by the bytes, so alpha and 16 bits stay. Rows that cannot be
packed are skipped; `rows` lists them with their reasons. A table may be compressed by gzip or zstd; its header tells
the delimiter. Captions of COCO, Karpathy's splits and Flickr's token files are read as they are. The
same command continues a pack that was interrupted."""

if TYPE_CHECKING:
    from data_tools.pack.rows import Source

_MEGA = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.usage = "%(prog)s [options] input output"  # several inputs are taken only to be refused in words
    parser.add_argument(
        "input",
        type=Path,
        nargs="+",
        help="a folder, a .csv, .tsv, .jsonl or .parquet table, a Hugging Face dataset,"
        " or captions of COCO, Karpathy or Flickr",
    )
    parser.add_argument("output", type=Path, help="the folder for shards and manifest.json")
    parser.add_argument(
        "--format",
        choices=["folder", "table", "huggingface", "imagefolder", "coco", "karpathy", "flickr"],
        help="of the input (default: as it looks)",
    )
    table = parser.add_argument_group("tables")
    table.add_argument("--image-column", metavar="NAME", help="column with the image's path (default: image)")
    table.add_argument("--caption-column", metavar="NAME", help="text, or a list of texts (default: caption, captions)")
    table.add_argument("--label-column", metavar="NAME", help="column with the class name; captions become optional")
    table.add_argument("--where", metavar="COLUMN=VALUE", action="append", help="keep these rows only; repeat for more")
    table.add_argument(
        "--image-root", type=Path, metavar="DIR", help="where paths start (default: the table's folder or its images/)"
    )
    table.add_argument(
        "--quotes",
        choices=["csv", "none"],
        help="csv: a field in double quotes may hold delimiters, line breaks and doubled quotes; none: a quote is a"
        " character (default: csv in .csv, none in .tsv)",
    )
    table.add_argument("--multiline", action="store_true", help="fields in quotes may hold lines that look like rows")
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="also take files outside the input that links, ../ or absolute paths lead to (default: skipped, listed)",
    )
    samples = parser.add_argument_group("samples")
    samples.add_argument("--labels", choices=["folder"], help="take the class from the first sub-folder")
    samples.add_argument(
        "--captions", choices=["lines"], help="lines: each line of a .txt is a caption (default: a .txt is one)"
    )
    samples.add_argument("--pairs", action="store_true", help="one sample per caption instead of one per image")
    samples.add_argument("--limit", type=int, metavar="N", help="stop after the first N samples of the input")
    samples.add_argument(
        "--resize", type=int, metavar="N", help="shrink the shortest side to N pixels (default: as it is)"
    )
    samples.add_argument(
        "--max-pixels",
        type=float,
        default=89,
        metavar="M",
        help="millions, per image (default: 89, which training decodes; more only with --resize)",
    )
    samples.add_argument("--max-megabytes", type=float, default=100, metavar="M", help="per image file (default: 100)")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--name", default="shard", help="shards are NAME-000000.tar and so on (default: shard)")
    shards.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="at most (default: 10000)")
    shards.add_argument("--shard-bytes", type=int, metavar="N", help="at most, by the size of the input files")
    shards.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Pack and print the summary; raises UserError when nothing was packed."""
    _check(args)
    from data_tools.pack import plan, rows  # late: `--help` must answer at once
    from data_tools.pack.image import Limits
    from data_tools.pack.inside import Boundary
    from data_tools.pack.run import run_plan
    from data_tools.pack.summary import counts, summarise

    started = time.monotonic()
    source = _read(args)
    found = rows.group(source, args.pairs)
    items = found[: args.limit]
    if len(items) < len(found):
        source.notes.append(f"took the first {len(items)} of {len(found)} samples, as --limit asks")
    rows.measure(items, Boundary(source.root, args.follow_links))
    limits = Limits(int(args.max_pixels * 1e6), int(args.max_megabytes * _MEGA), args.resize)
    settings = plan.Settings(args.name, args.samples_per_shard, args.shard_bytes, args.pairs, limits)
    report = run_plan(plan.make_plan(source, items, settings), args.output, args.workers or available_cores())
    for line in summarise(source, report, args.output, time.monotonic() - started):
        print(line)
    if not report.samples:
        raise UserError(
            "nothing was packed",
            got=f"{report.rows} rows, all skipped: {counts(report.skipped)}",
            remedy=f"mend them; `python -m data_tools rows {args.output}` lists them",
        )
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "resize", "samples_per_shard", "shard_bytes", "workers", "max_pixels", "max_megabytes"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} is not positive", got=value)
    if args.resize is None and args.max_pixels * 1e6 > MAX_PIXELS:
        raise UsageError(
            "--max-pixels is more than training decodes",
            got=f"{args.max_pixels:g} million",
            expected=f"at most {MAX_PIXELS / 1e6:g} million",
            remedy="add --resize N, which shrinks larger pictures",
        )
    check_shard_name(args.name)
    if args.where and not all("=" in pair for pair in args.where):
        raise UsageError("bad --where", got=", ".join(args.where), expected="COLUMN=VALUE")


def _read(args: argparse.Namespace) -> "Source":
    """What the input says, told in a line."""
    from data_tools.pack.inputs import FOLDER, IMAGEFOLDER, KINDS, kind_of, single_input

    path = single_input(args.input)
    kind = kind_of(path, args.format)
    if kind == IMAGEFOLDER and args.labels and not args.format:  # classes by folder need no metadata
        kind = FOLDER
    source = _read_as(kind, path, args)
    images, captions = (
        len({row.image for row in source.rows if row.image}),
        sum(len(row.captions) for row in source.rows),
    )
    print(f"read as: {KINDS[kind]}, {images:,} images, {captions:,} captions", flush=True)
    return source


def _read_as(kind: str, path: Path, args: argparse.Namespace) -> "Source":
    from data_tools.pack.delimited import Dialect
    from data_tools.pack.folder import read_folder
    from data_tools.pack.imagefolder import FILE_COLUMN, add_unlisted, caption_column, metadata_of
    from data_tools.pack.inputs import DATASET, FOLDER, IMAGEFOLDER, TABLE
    from data_tools.pack.span import Spool
    from data_tools.pack.table import Columns, Held, read_table

    table_only = ("image_column", "caption_column", "label_column", "where", "image_root", "quotes", "multiline")
    if path.is_dir() and args.output.absolute().is_relative_to(path.absolute()):
        raise UsageError("the output lies inside the input folder", got=args.output, remedy="choose a folder beside it")
    if kind == FOLDER:
        for name in table_only:
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} is for tables", got=f"the folder {path}")
        return read_folder(path, args.labels == "folder", args.follow_links, args.captions == "lines")
    if args.labels:
        raise UsageError("--labels folder is for folders", got=path, remedy="use --label-column")
    if args.captions:
        raise UsageError("--captions lines is for folders", got=path, remedy="put a list into the caption column")
    where = tuple(tuple(pair.split("=", 1)) for pair in args.where or ())
    columns = Columns(args.image_column or "image", args.caption_column, args.label_column, where)
    dialect = Dialect(None if args.quotes is None else args.quotes == "csv", args.multiline)
    if kind == IMAGEFOLDER:
        table = metadata_of(path) or path
        columns = Columns(
            args.image_column or FILE_COLUMN, args.caption_column or caption_column(table), args.label_column, where
        )
        source = read_table(table, columns, args.image_root or path, dialect)
        if not where:  # what has no metadata does not pass a filter either
            add_unlisted(source, args.follow_links)
        return source
    if kind == DATASET:
        held = Held(Spool(args.output), args.follow_links)
        return read_table(path, columns, args.image_root, dialect, held=held)
    return read_table(path, columns, args.image_root, dialect, None if kind == TABLE else kind)
