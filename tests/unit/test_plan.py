"""The memory that --dry-run promises."""

import pytest
import torch

import tiny
from pretrain.config.tree import ModelConfig, OptimConfig, TrainConfig
from pretrain.objectives.objective import Weighted, build
from pretrain.plan import memory as memory_plan
from pretrain.plan.memory import activation_bytes, host_bytes, memory, state_bytes
from pretrain.process.runtime import Runtime, start
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.classify import build_classifier
from pretrain.tasks.contrastive import make_model

MODEL = "configs/models/vit_scenes_16.json"


def of_pairs(config, model):
    """The memory of a contrastive run of `model`."""
    return memory(config, model, tiny.rows(model), build(config.objectives), start(distributed=False))


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"),
    [(0, 4000, 4000, 8000), (1, 4000, 4000, 3000), (2, 4000, 1000, 3000), (3, 5000, 1000, 3000)],
)
def test_states_of_a_thousand_parameters_on_four_ranks(stage, weights, gradients, states):
    parts = state_bytes(1000, 1000, 2000, TrainConfig(zero_stage=stage), OptimConfig(), 4)
    assert list(parts.values()) == [weights, gradients, states]


def test_zero_3_keeps_a_billion_parameters_gathered_at_most():
    weights = state_bytes(6 * 10**9, 6 * 10**9, 0, TrainConfig(zero_stage=3), OptimConfig(), 4)["weights"]
    assert weights == 4 * (1.5 * 10**9 + 10**9)


def test_micro_batches_add_their_largest_gradient():
    def formula(micro_batch):
        config = ContrastiveConfig(
            model=ModelConfig(MODEL), train=TrainConfig(global_batch=16, micro_batch=micro_batch, precision="fp32")
        )
        return of_pairs(config, model)

    model = make_model(ContrastiveConfig(model=ModelConfig(MODEL)))
    ((name, added),) = [(k, v) for k, v in formula(8).items() if k not in formula(16)]
    assert "largest gradient" in name
    assert added == 4 * model.clip.token_embedding.weight.numel()


def test_a_locked_tower_has_weights_alone():
    parts = state_bytes(1000, 400, 800, TrainConfig(zero_stage=1), OptimConfig(), 4)
    assert list(parts.values()) == [4000, 1600, 1200]


def test_a_moving_average_is_shared_at_every_stage():
    for stage in range(4):
        assert (
            state_bytes(1000, 1000, 2000, TrainConfig(zero_stage=stage), OptimConfig(ema=0.9), 4)["moving average"]
            == 1000
        )


def test_each_optimizer_counts_what_it_keeps():
    model = tiny.build()
    size = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".resblocks." in name and p.ndim == 2)

    def kept(name, stage):
        train = TrainConfig(global_batch=16, zero_stage=stage, precision="fp32")
        config = ContrastiveConfig(optim=OptimConfig(name=name), train=train)
        return of_pairs(config, model)["optimizer states and master"]

    assert kept("adamw", 0) == kept("lamb", 0) == 8 * size
    assert kept("adamw", 1) == 12 * size
    assert (kept("lion", 0), kept("lion", 1)) == (4 * size, 8 * size)
    assert kept("muon", 0) == 8 * size - 4 * matrices
    assert host_bytes(1000, TrainConfig(zero_stage=2, offload_optimizer=True), OptimConfig(name="lion"), 4) == 3000


def test_an_offloaded_optimizer_takes_memory_of_the_host():
    offloaded = TrainConfig(zero_stage=2, offload_optimizer=True)
    assert state_bytes(1000, 1000, 2000, offloaded, OptimConfig(), 4) == {"weights": 4000, "gradients": 1000}
    assert host_bytes(1000, offloaded, OptimConfig(), 4) == 4000
    assert host_bytes(1000, TrainConfig(zero_stage=2), OptimConfig(), 4) == 0


def test_activations_shrink_under_autocast():
    model = tiny.build()
    full, half = (activation_bytes(model, tiny.rows(model), {}, bf16) for bf16 in (False, True))
    assert 0 < half < full


def test_activations_shrink_where_the_settings_checkpoint_them():
    def activations(towers):
        config = ContrastiveConfig(
            model=ModelConfig(MODEL), train=TrainConfig(grad_checkpointing=towers, precision="fp32")
        )
        return of_pairs(config, make_model(config))["activations of a micro-batch"]

    none, image, text, both = (activations(towers) for towers in ([], ["image"], ["text"], ["image", "text"]))
    assert both < min(image, text) < max(image, text) < 0.9 * none
    assert none - both == (none - image) + (none - text)


def test_a_classifier_checkpoints_its_tower():
    config = ClassifyConfig(init=MODEL, random=True, train=TrainConfig(grad_checkpointing=["image"]))
    classifier, _ = build_classifier(config, ("cat", "dog"), start(distributed=False))
    assert classifier.towers.clip.visual.transformer.grad_checkpointing
    assert not classifier.towers.clip.transformer.grad_checkpointing


@pytest.mark.parametrize(
    ("device", "ranks", "free", "warned"),
    [
        ("cpu", 1, 100, False),
        ("cpu", 2, 100, True),
        ("cpu", 1, None, False),
        ("cuda", 2, 100, False),
        ("cuda", 1, 59, True),
    ],
)
def test_a_run_that_does_not_fit_is_warned_of(monkeypatch, device, ranks, free, warned):
    """Ranks of a node share its memory; a GPU is one rank's."""
    gib = 2**30
    monkeypatch.setattr(memory_plan, "free_bytes", lambda: free and free * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * gib, 141 * gib))
    said = memory_plan.too_much(60 * gib, Runtime(0, ranks, 0, torch.device(device), 1, ranks))
    assert said.startswith("warning:") == warned
    assert (f"{free}.0 GiB that are free" in said) == warned


def test_activations_are_of_what_the_fields_of_a_task_bring():
    """A run that reads no texts keeps none of the text tower's; what is mined is encoded as well."""
    model = tiny.build()
    pairs = tiny.rows(model)

    def images(n):
        return {"image": pairs(n)["image"]}

    class Mines:
        wants = frozenset()
        reads = frozenset({"image"})

        def mine(self, rows, facts, draw):
            return {"image": torch.arange(len(rows["image"]))}

        def count(self, inputs):
            return 1

        def loss(self, outputs, inputs):
            return outputs["rows"]["image"].sum()

    alone, both = (activation_bytes(model, rows, {}, bf16=False) for rows in (images, pairs))
    mining = activation_bytes(model, images, {"it": Weighted(Mines())}, bf16=False)
    assert 0 < alone < 0.8 * both
    assert 1.8 * alone < mining < 2.2 * alone
