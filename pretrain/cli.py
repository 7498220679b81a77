"""`launch/pretrain.py`: trainings. Imports torch only once the settings are known to be good."""

from __future__ import annotations

import argparse
import os

from data_tools.arguments import Parser
from data_tools.errors import UsageError
from pretrain.config.reading import find_run_dir, load_task
from pretrain.config.registry import load
from pretrain.config.tree import Config
from pretrain.places import check_settings
from pretrain.process.entry import refuse_bare_world, run_entry
from pretrain.process.lifeline import Lifeline
from pretrain.process.status import fail_unbuilt
from pretrain.tasks import TASKS

_EXAMPLES = """examples:
  deepspeed launch/pretrain.py --config configs/quickstart.yaml
  deepspeed --num_accelerators 2 launch/pretrain.py --config configs/photos_cpu.yaml run.dir=runs/a optim.lr=5e-4
  deepspeed --hostfile hosts launch/pretrain.py --config my.yaml train.zero_stage=2 train.precision=bf16
  python launch/pretrain.py --config my.yaml --dry-run

A run continues by itself from the newest intact checkpoint in run.dir. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint
and stop; a second Ctrl-C ends at once. run.dir/status.json says how far the run is, and how it ended.
exit codes: 0 done, 1 failed, 2 usage or config error, 75 stopped on a signal with a checkpoint written, 130 interrupted
twice.
"""


def parser(job: str, description: str, examples: str) -> Parser:
    """The command line that training jobs share."""
    words = Parser(
        prog=f"python launch/{job}.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--config", required=True, metavar="FILE", help="YAML settings; start from one in configs/")
    words.add_argument("--dry-run", action="store_true", help="check settings, shards and model; say what would run")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    words.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    return words


def run_training(options: argparse.Namespace, default: str) -> int:
    """Do what a training's command line asks for; returns the exit code. `default`: the task where the settings name
    none. What the task builds imports torch."""
    if options.dry_run:
        config = load_task(TASKS, options.config, options.overrides, default)
        check_settings(config)
        return load(TASKS[config.task].plan)(config)
    refuse_bare_world()
    config = _read_settings(options, default)
    with Lifeline(config.run.dir) as life:
        check_settings(config)
        from pretrain.train import launch

        return launch(life, lambda runtime: TASKS[config.task].load()(config, runtime))


def _read_settings(options: argparse.Namespace, default: str) -> Config:
    """The settings of a training's command line. Where they are no good, an earlier run that they would have gone on
    with is failed by its status.json too, lest a scheduler start it for ever."""
    try:
        return load_task(TASKS, options.config, options.overrides, default)
    except UsageError as error:
        folder = find_run_dir(options.config, options.overrides)
        if folder is not None and os.environ.get("RANK", "0") == "0":
            fail_unbuilt(folder, str(error))
        raise


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    about = "Contrastive pretraining of an image-text dual encoder under DeepSpeed."
    options = parser("pretrain", about, _EXAMPLES).parse_intermixed_args(arguments)
    return run_training(options, "contrastive")
