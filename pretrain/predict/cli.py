"""`launch/predict.py`: what a fine-tuned classifier says of pictures. Imports torch only when needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.arguments import Parser, at_least
from data_tools.errors import UsageError
from pretrain.config.tree import PRECISIONS
from pretrain.engine.places import check_model, check_output, check_present
from pretrain.process.entry import refuse_ranks, run_entry

FORMATS = (".csv", ".parquet")
_EXAMPLES = """examples:
  python launch/predict.py --model runs/flowers --input photos --output predictions.csv
  python launch/predict.py --model runs/flowers --input table.csv --image-column file --output predictions.parquet
  python launch/predict.py --model runs/flowers --input data/flowers/test --output predictions.parquet --batch 256

One row a picture, in the order of the input: id (path or key), prediction, probability, the next best as prediction_2,
probability_2, ... up to --top-k, and p_CLASS for every class. A picture that cannot be read keeps its row, without a
prediction, with the reason in `error`. The model's hash and the classes stand in the metadata of the Parquet file, and
beside a CSV file in FILE.json. exit codes: 0 done, 1 failed, 2 usage error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    from pretrain.predict.command import predict  # late: imports torch

    return predict(options)


def _parser() -> Parser:
    words = Parser(
        prog="python launch/predict.py",
        description="Classify pictures with what launch/finetune.py trained.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--model", required=True, metavar="DIR", help="a run or checkpoint folder of a fine-tune")
    words.add_argument(
        "--input", required=True, metavar="PATH", help="a folder of pictures, a picture, a table, or shards"
    )
    words.add_argument("--output", required=True, metavar="FILE", help="a .csv or .parquet file; it is replaced")
    words.add_argument("--top-k", type=int, default=5, metavar="K", help="predictions in a row (default: 5)")
    words.add_argument("--image-column", default="image", metavar="NAME", help="of a table (default: image)")
    words.add_argument(
        "--image-root", metavar="DIR", help="where the paths of a table begin (default: the table's folder)"
    )
    words.add_argument("--batch", type=int, default=64, metavar="N", help="images in one forward (default: 64)")
    words.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default: 1)")
    words.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the tower (default: fp32)")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return words


def _check(options: argparse.Namespace) -> None:
    """What can be told without torch: numbers, and whether the paths are there."""
    at_least(options, top_k=1, batch=1, workers=0)
    output = Path(options.output)
    if output.suffix.lower() not in FORMATS:
        raise UsageError("--output is no file of predictions", got=output.name, expected=" or ".join(FORMATS))
    refuse_ranks("predict")
    check_model(options.model)
    check_present("--input", options.input)
    check_output("--output", options.output)
