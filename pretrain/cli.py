"""`launch/pretrain.py` and `launch/finetune.py`: trainings. torch is imported once settings are known to be good."""

from __future__ import annotations

import argparse
import os
from functools import partial

from data_tools.arguments import Parser
from data_tools.errors import UsageError
from pretrain.config.reading import find_run_dir
from pretrain.process.entry import refuse_bare_world, run_entry
from pretrain.process.lifeline import Lifeline
from pretrain.process.status import fail_unbuilt
from pretrain.tasks import TaskConfig, read_settings
from pretrain.tasks.paths import check_settings

_PRETRAIN = """examples:
  deepspeed launch/pretrain.py --config configs/quickstart.yaml
  deepspeed --num_accelerators 2 launch/pretrain.py --config configs/photos_cpu.yaml run.dir=runs/a optim.lr=5e-4
  deepspeed --hostfile hosts launch/pretrain.py --config my.yaml train.zero_stage=2 train.precision=bf16
  python launch/pretrain.py --config my.yaml --dry-run

A run continues by itself from the newest intact checkpoint in run.dir. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint
and stop; a second Ctrl-C ends at once. run.dir/status.json says how far the run is, and how it ended.
exit codes: 0 done, 1 failed, 2 usage or config error, 75 stopped on a signal with a checkpoint written, 130 interrupted
twice.
"""
_FINETUNE = """examples:
  deepspeed launch/finetune.py --config configs/finetune/scenes.yaml init=runs/quickstart
  deepspeed --num_accelerators 2 launch/finetune.py --config configs/finetune/flowers.yaml init=EXPORT_DIR mode=linear
  deepspeed launch/finetune.py --config my.yaml init=EXPORT_DIR data.train.0.urls='s-{000..009}.tar' classes=names.txt
  python launch/finetune.py --config configs/finetune/flowers.yaml init=EXPORT_DIR --dry-run

A run that goes on from its checkpoint reads neither init nor the prompts, and needs no init=.
What was trained is evaluated by launch/evaluate.py, predicts by launch/predict.py, and is exported by launch/export.py.

exit codes: 0 done, 1 failed, 2 usage or config error, 75 stopped on a signal with a checkpoint written, 130 interrupted
twice.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of pretraining; returns the exit code."""
    about = "Contrastive pretraining of an image-text dual encoder under DeepSpeed."
    return run_entry(partial(_run, "pretrain", about, _PRETRAIN, "contrastive"), arguments)


def finetune(arguments: list[str] | None = None) -> int:
    """Entry point of fine-tuning; returns the exit code."""
    about = "Fine-tune the image tower of a dual encoder as a classifier, under DeepSpeed."
    return run_entry(partial(_run, "finetune", about, _FINETUNE, "classify"), arguments)


def _run(script: str, about: str, examples: str, task: str, arguments: list[str]) -> int:
    """`task`: that of settings that name none."""
    words = Parser(
        prog=f"python launch/{script}.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--config", required=True, metavar="FILE", help="YAML settings; start from one in configs/")
    words.add_argument("--dry-run", action="store_true", help="check settings, shards and model; say what would run")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    words.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    options = words.parse_intermixed_args(arguments)
    if options.dry_run:
        config = read_settings(options.config, options.overrides, task)
        check_settings(config)
        from pretrain.plan.dry_run import dry_run

        return dry_run(config)
    refuse_bare_world()
    config = _read_settings(options, task)
    with Lifeline(config.run.dir) as life:
        check_settings(config)
        from pretrain.job import Job
        from pretrain.train import launch

        return launch(life, partial(Job, config))


def _read_settings(options: argparse.Namespace, task: str) -> TaskConfig:
    """The settings of a training's command line. Where they are no good, an earlier run that they would have gone on
    with is failed by its status.json too, lest a scheduler start it for ever."""
    try:
        return read_settings(options.config, options.overrides, task)
    except UsageError as error:
        folder = find_run_dir(options.config, options.overrides)
        if folder is not None and os.environ.get("RANK", "0") == "0":
            fail_unbuilt(folder, str(error))
        raise
