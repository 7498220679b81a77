"""`launch/evaluate.py`: an evaluator on a run, checkpoint or export. Imports torch only when needed."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import fields
from typing import NoReturn

from data_tools.arguments import Parser, at_least
from data_tools.errors import UsageError
from pretrain.config.reading import read_section
from pretrain.config.tree import PRECISIONS
from pretrain.engine.places import check_model, check_output
from pretrain.evaluate import EVALUATORS, EvaluatorConfig
from pretrain.process.entry import refuse_bare_world, run_entry

_SETTINGS = ("templates", "classes", "captions", "loss_batch")  # options that are settings of evaluators
_EXAMPLES = """examples:
  python launch/evaluate.py --model runs/photos --task retrieval --data shards/val --output results.jsonl
  python launch/evaluate.py --model runs/photos --task retrieval --data shards/val --picture retrieval.png
  python launch/evaluate.py --model export --task classification --data shards/flowers_test --templates openai
  python launch/evaluate.py --model export --task classification --data 's-{{000..003}}.tar' --classes names.txt
  python launch/evaluate.py --model runs/finetune_flowers --task classification --data shards/flowers_test
  python launch/evaluate.py --model epoch_32.pt --architecture ViT-B-32 --task retrieval --data shards/val
  python launch/evaluate.py --model runs/scenes --task pairs --data shards/minimal_pairs
  deepspeed launch/evaluate.py --model runs/photos --task retrieval --data shards/val --batch 256

tasks:
{tasks}
Ties count as their expectation in random order: a collapsed model scores at chance.
exit codes: 0 done, 1 failed, 2 usage error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    options = _parser().parse_intermixed_args(arguments)
    refuse_bare_world()
    settings = _settings(options)
    _check(options, settings)
    from pretrain.evaluate.command import evaluate  # late: imports torch

    return evaluate(options, settings)


def _tasks() -> str:
    """The evaluators, a paragraph each, for the help."""
    width = max(map(len, EVALUATORS)) + 2
    lines = []
    for name, entry in EVALUATORS.items():
        first, *more = textwrap.wrap(entry.settings.ABOUT, 118 - width)
        lines += [f"  {name:<{width}}{first}", *(" " * (width + 2) + line for line in more)]
    return "\n".join(lines)


def _parser() -> Parser:
    words = Parser(
        prog="python launch/evaluate.py",
        description="Evaluation of a model, alone or sharded over the ranks of deepspeed or torchrun.",
        epilog=_EXAMPLES.format(tasks=_tasks()),
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
    words.add_argument("--task", required=True, choices=EVALUATORS)
    words.add_argument(
        "--data", required=True, metavar="SHARDS", help="a packed folder, a folder of tars, a tar or a pattern of tars"
    )
    _add_settings(words)
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
    words.add_argument("--picture", metavar="PNG", help="draw some captions with the images found for them (retrieval)")
    words.add_argument("--seed", type=int, default=0, metavar="N", help="which captions --picture draws (default: 0)")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return words


def _add_settings(words: Parser) -> None:
    words.add_argument(
        "--templates", metavar="NAME", help="photo (default), simple, openai, or a file with {c} in each line"
    )
    words.add_argument(
        "--classes", metavar="FILE", help="names of the labels 0, 1, ..., one a line; default: those packed"
    )
    words.add_argument(
        "--loss-batch",
        type=int,
        metavar="N",
        help="pairs in a batch of the validation loss, which is InfoNCE whatever trained the model (default: 256)",
    )
    words.add_argument(
        "--captions",
        metavar="PLACES",
        help="where captions are, as in data.train.N.captions; lines: each line of a .txt",
    )
    words.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="more settings of the task: configs/README.md, evaluators",
    )


def _settings(options: argparse.Namespace) -> EvaluatorConfig:
    """Of the evaluator that --task names."""
    kind = EVALUATORS[options.task].settings
    at_least(options, loss_batch=2)
    given = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    known = {name: [one.name for one in fields(entry.settings)] for name, entry in EVALUATORS.items()}
    for name in given:
        if name not in known[options.task]:
            _refuse(name.replace("_", "-"), [task for task in known if name in known[task]], options.task)
    given |= {"type": options.task, "data": options.data}
    return read_section(kind, given, options.settings, f"--task {options.task}")


def _refuse(option: str, tasks: list[str], task: str) -> NoReturn:
    raise UsageError(f"--{option} belongs to --task {' and '.join(tasks)}", got=f"--task {task}")


def _check(options: argparse.Namespace, settings: EvaluatorConfig) -> None:
    at_least(options, batch=1, workers=0)
    if options.picture is not None and not settings.DRAWS:
        _refuse("picture", [name for name, entry in EVALUATORS.items() if entry.settings.DRAWS], options.task)
    if options.skip_existing and not options.output:
        raise UsageError("--skip-existing needs --output")
    check_model(options.model)
    settings.check_paths()
    check_output("--output", options.output)
    check_output("--picture", options.picture)
