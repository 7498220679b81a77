"""`launch/export.py`: a run, checkpoint or export folder -> a folder for open_clip, transformers or timm."""

from __future__ import annotations

import argparse
import os

from data_tools.arguments import Parser
from pretrain.engine.places import check_model, check_output
from pretrain.process.entry import refuse_ranks, run_entry

_EXAMPLES = """examples:
  python launch/export.py runs/photos export/photos
  python launch/export.py runs/photos/checkpoints/step-000001200 export/early --formats open_clip
  python launch/export.py runs/finetune_flowers export/flowers

The folder is loaded through each client, its features are compared with the trainer's, and only then does it get its
name. exit codes: 0 done, 1 failed, 2 usage error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    words = Parser(
        prog="python launch/export.py",
        description="Write a trained dual encoder for open_clip and transformers, or a fine-tuned classifier for "
        "timm and transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument(
        "model",
        metavar="RUN",
        help="a run, checkpoint or export folder, a folder of open_clip or of transformers' CLIP, or a weights file",
    )
    words.add_argument(
        "--architecture",
        metavar="NAME",
        help="of a bare weights file: an open_clip name or the path of its JSON",
    )
    words.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema)")
    words.add_argument("output", metavar="OUT_DIR", help="a new or empty folder")
    words.add_argument(
        "--formats",
        metavar="NAMES",
        help="open_clip,transformers of a dual encoder, timm,transformers of a classifier (default: both)",
    )
    words.add_argument("--no-verify", dest="verify", action="store_false", help="do not load the folder for a check")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    options = words.parse_args(arguments)
    refuse_ranks("export")
    check_model(options.model)
    check_output("OUT_DIR", options.output, folder=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing is fetched
    from pretrain.export.command import export  # late: imports torch

    return export(options)
