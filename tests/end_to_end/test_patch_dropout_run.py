"""Patch dropout and phases in whole runs: neither the number of ranks nor a restart changes anything."""

import json

import pytest
import yaml

import runs
import tiny
from pretrain.config.reading import load_config
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from ranks import run_ranks
from training import train

PRETRAIN = ["optim.warmup=0 steps", "train.micro_batch=4", "evaluators={}"]
FINETUNE = ["optim.warmup=0 steps", "zero_shot_head=false"]


def trained(rank, world_size, config, path, overrides):
    words = ["data.workers=0", "evaluators={}", "train.duration=4 steps", *overrides]
    built = Job(load_config(config, path, words), start(distributed=True))
    assert all(module.training for module in built.engine.module.modules())
    assert train(built) == 0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    dropping = tiny.MODEL_CFG["vision_cfg"] | {"patch_size": 8, "patch_dropout": 0.5}
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG | {"vision_cfg": dropping}))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["model"], config["evaluators"]["retrieval"]
    (folder / "finetune.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_losses_are_those_of_one_rank(workspace):
    for world_size in (1, 2):
        words = [f"run.dir={workspace / f'pretrain-{world_size}'}", *PRETRAIN]
        run_ranks(world_size, trained, ContrastiveConfig, workspace / "config.yaml", words)
    one, two = (runs.losses(workspace / f"pretrain-{world_size}") for world_size in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    for world_size in (1, 2):
        words = [f"run.dir={workspace / f'finetune-{world_size}'}", f"init={workspace / 'pretrain-1'}", *FINETUNE]
        run_ranks(world_size, trained, ClassifyConfig, workspace / "finetune.yaml", words)
    one, two = (runs.losses(workspace / f"finetune-{world_size}") for world_size in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)


PHASES = ["model.phases=[{until: 2 steps, image_size: 16, patch_dropout: 0.25}]"]


def test_phases_are_those_of_one_rank_and_of_a_run_without_a_stop(workspace):
    """Images of 2 x 2 patches for two steps, then 4 x 4; the second run goes on within the first phase, on two ranks,
    under ZeRO-3, where the resized embedding is a gathered one."""
    folders = {name: workspace / f"phases-{name}" for name in ("one", "two", "plain")}
    for name, world_size, words in (
        ("one", 1, PHASES),
        ("two", 1, [*PHASES, "train.duration=1 steps"]),
        ("two", 2, [*PHASES, "train.zero_stage=3"]),
        ("plain", 1, []),
    ):
        words = [f"run.dir={folders[name]}", *PRETRAIN, "optim.schedule=constant", *words]
        run_ranks(world_size, trained, ContrastiveConfig, workspace / "config.yaml", words)
    one, two, plain = (runs.losses(folders[name]) for name in folders)
    assert one == pytest.approx(two, rel=1e-5)
    assert one[1] != pytest.approx(plain[1], rel=1e-3)
