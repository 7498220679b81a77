"""`launch/evaluate.py`: zero-shot evaluation of a run, checkpoint or export. Imports torch only when needed."""

from __future__ import annotations

import argparse

from data_tools.arguments import Parser, at_least
from data_tools.errors import UsageError
from pretrain.config.tree import PRECISIONS
from pretrain.engine.places import check_corpus, check_file, check_model, check_output, check_templates
from pretrain.process.entry import refuse_bare_world, run_entry

TASKS = ("retrieval", "classification", "pairs")
_EXAMPLES = """examples:
  python launch/evaluate.py --model runs/photos --task retrieval --data shards/val --output results.jsonl
  python launch/evaluate.py --model runs/photos --task retrieval --data shards/val --picture retrieval.png
  python launch/evaluate.py --model export --task classification --data shards/flowers_test --templates openai
  python launch/evaluate.py --model export --task classification --data 's-{000..003}.tar' --classes names.txt
  python launch/evaluate.py --model runs/finetune_flowers --task classification --data shards/flowers_test
  python launch/evaluate.py --model epoch_32.pt --architecture ViT-B-32 --task retrieval --data shards/val
  python launch/evaluate.py --model runs/scenes --task pairs --data shards/minimal_pairs
  deepspeed launch/evaluate.py --model runs/photos --task retrieval --data shards/val --batch 256

tasks:
  retrieval       recall@1/5/10 and median rank in both directions, all captions; validation loss
  classification  top-1 (top-5 above five classes), mean per class: zero-shot, or of a fine-tuned classifier, whose
                  classes are matched to the data's by name
  pairs           minimal pairs: nearer to the own caption than to the partner's, Winoground's scores
Ties count as their expectation in random order: a collapsed model scores at chance.
exit codes: 0 done, 1 failed, 2 usage error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    refuse_bare_world()
    _check(options)
    from pretrain.evaluate.command import evaluate  # late: imports torch

    return evaluate(options)


def _parser() -> Parser:
    words = Parser(
        prog="python launch/evaluate.py",
        description="Zero-shot evaluation, alone or sharded over the ranks of deepspeed or torchrun.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a run, checkpoint or export folder, a folder of open_clip or of transformers' CLIP, or a weights file",
    )
    words.add_argument(
        "--architecture",
        metavar="NAME",
        help="of a bare weights file: an open_clip name or the path of its JSON",
    )
    words.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema)")
    words.add_argument("--task", required=True, choices=TASKS)
    words.add_argument(
        "--data", required=True, metavar="SHARDS", help="a packed folder, a folder of tars, a tar or a pattern of tars"
    )
    words.add_argument("--output", metavar="FILE", help="append the result as a line of JSON")
    words.add_argument("--skip-existing", action="store_true", help="do nothing where --output has this very result")
    words.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images in one forward of a rank (default: 64)"
    )
    words.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes per rank (default: 1)")
    words.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the towers (default fp32, the same figures everywhere); auto: bf16 where the device has units for it",
    )
    words.add_argument(
        "--templates", metavar="NAME", help="photo (default), simple, openai, or a file with {c} in each line"
    )
    words.add_argument(
        "--classes", metavar="FILE", help="names of the labels 0, 1, ..., one a line; default: those packed"
    )
    words.add_argument(
        "--loss-batch",
        type=int,
        default=256,
        metavar="N",
        help="pairs in a batch of the validation loss, which is InfoNCE whatever trained the model (default: 256)",
    )
    words.add_argument(
        "--captions",
        metavar="PLACES",
        help="where captions are, as in data.train.N.captions; lines: each line of a .txt",
    )
    words.add_argument("--picture", metavar="PNG", help="draw some captions with the images found for them (retrieval)")
    words.add_argument("--seed", type=int, default=0, metavar="N", help="which captions --picture draws (default: 0)")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return words


def _check(options: argparse.Namespace) -> None:
    at_least(options, batch=1, loss_batch=2, workers=0)
    if options.captions and options.task == "classification":
        raise UsageError("--captions is for tasks with captions", got="--task classification")
    for name, task in (("templates", "classification"), ("classes", "classification"), ("picture", "retrieval")):
        if getattr(options, name) is not None and options.task != task:
            raise UsageError(f"--{name} belongs to --task {task}", got=f"--task {options.task}")
    if options.skip_existing and not options.output:
        raise UsageError("--skip-existing needs --output")
    check_model(options.model)
    check_corpus(options.data)
    check_file("class file", options.classes)
    check_templates(options.templates or "photo")
    check_output("--output", options.output)
    check_output("--picture", options.picture)
