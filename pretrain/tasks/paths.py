"""Every path that a training reads, looked at before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from data_tools.errors import UsageError
from pretrain.config.tree import Config
from pretrain.engine.places import check_architecture, check_corpus, check_file, check_model, check_templates
from pretrain.tasks import ClassifyConfig, ContrastiveConfig, TaskConfig


def check_settings(config: TaskConfig) -> None:
    """Look at every path that a training reads. Ranks of several hosts see different disks: there it is left to those
    who open them, after the ranks have met, so that the fault of one host ends all.

    Raises:
        UserError: nothing is there.
    """
    if _several_hosts():
        return
    for source in config.data.train:
        check_corpus(source.urls)
    for evaluator in config.evaluators.values():
        evaluator.check_paths()
    if isinstance(config, ContrastiveConfig):
        check_architecture(config.model.name)
        if config.model.init is not None and not goes_on(config):
            check_model(config.model.init)
    if isinstance(config, ClassifyConfig):
        _check_classifier(config)


def _check_classifier(config: ClassifyConfig) -> None:
    if not goes_on(config):
        init = require_init(config)
        check_architecture(init) if config.random else check_model(init)
        check_templates(config.templates)
    if isinstance(config.classes, str) and not config.classes.isdecimal():
        check_file("class file", config.classes)


def goes_on(config: Config) -> bool:
    """Whether run.dir holds checkpoints to go on from: then nothing is read that only a start needs."""
    from pretrain.engine.committed import FOLDER, committed  # late: it imports numpy

    return config.run.resume == "auto" and bool(committed(Path(config.run.dir) / FOLDER))


def require_init(config: ClassifyConfig) -> str:
    """What a fine-tune starts from. Raises UsageError where nothing is named."""
    if config.init is None:
        raise UsageError(
            "config value 'init' is not set",
            expected="a model to start from: run.dir holds no checkpoint to go on from",
            remedy="init=RUN_OR_EXPORT_DIR",
        )
    return config.init


def _several_hosts() -> bool:
    """Whether ranks run on other hosts too, as far as launchers say."""
    size, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return here is not None and here != size
