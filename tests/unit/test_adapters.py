"""The adapters that settings ask for: which, in which order, and what becomes of what they add."""

from dataclasses import dataclass

import pytest
import torch

import checkpoints
import tiny
from data_tools.errors import UsageError, UserError
from pretrain.config.check import check
from pretrain.config.declare import choice, number
from pretrain.config.reading import load_config
from pretrain.config.registry import Entry
from pretrain.config.tree import DataConfig, ModelConfig, Phase, RunConfig, Source, TrainConfig
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import classifier_of, describe, load_classifier, load_trained
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.towers.adapt import ADAPTERS, AdapterConfig, compiling, described
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.adapt.order import adapt, adapters_in, adapters_of, merge
from pretrain.towers.classifier import Classifier
from pretrain.towers.initialise import initialise
from pretrain.towers.parts import tower_of, towers_of

PLACES = {"run": RunConfig("x"), "data": DataConfig([Source("x")])}
PHASES = [Phase("1 steps", image_size=16), Phase("2 steps", patch_dropout=0.5)]


def test_settings_that_ask_for_nothing_change_nothing():
    assert adapters_of(ContrastiveConfig(**PLACES)) == []


def test_there_is_one_order():
    config = ContrastiveConfig(
        **PLACES,
        model=ModelConfig(init="x", locked=["image"], phases=PHASES),
        train=TrainConfig(grad_checkpointing=["text"], compile=True),
    )
    kinds = [type(adapter).__name__ for adapter in adapters_of(config)]
    assert kinds == ["SizePhases", "PatchPhases", "Lock", "GradCheckpointing", "Compile"]


def test_all_of_them_reach_the_towers(monkeypatch):
    monkeypatch.setattr(compiling, "CompiledTowers", lambda clip, rule: (clip, rule))
    config = ContrastiveConfig(
        **PLACES,
        model=ModelConfig(init="x", locked=["text"], phases=PHASES),
        train=TrainConfig(grad_checkpointing=["image", "text"], compile=True),
    )
    model = tiny.build()
    adapt(model, adapters_of(config))
    assert model.patch_shares == [None, 0.5, None]
    assert "_embeds" in vars(model.clip.visual)
    assert {tower_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"image", "logits"}
    assert model.clip.transformer.grad_checkpointing
    assert model.clip.visual.transformer.grad_checkpointing
    assert model.compiled == (model.clip, model.rule)
    assert model.rule.multiple == 16


@pytest.mark.parametrize(("mode", "learning"), [("linear", {"head"}), ("full", {"head", "image"})])
def test_of_a_classifier_no_text_learns(mode, learning):
    towers = tiny.build(init_logit_bias=-1.0)
    model = Classifier(towers, ("a", "b"), towers.clip.text_projection.detach()[:2], 3.0)
    config = ClassifyConfig(**PLACES, mode=mode, train=TrainConfig(grad_checkpointing=["image"]))
    adapt(model, adapters_of(config))
    assert {tower_of(name) for name, p in model.named_parameters() if p.requires_grad} == learning
    assert towers.clip.visual.transformer.grad_checkpointing
    assert not towers.clip.transformer.grad_checkpointing


@dataclass(frozen=True)
class ShiftConfig(AdapterConfig):
    type: str = choice("shift")
    by: float = number(1.0, gt=0, le=9)


class Shift(Adapter):
    """Adds a learned vector, at first `by`, to the bias of the last norm of each of its parts."""

    def __init__(self, settings, seed):
        self.settings, self.seed = settings, seed

    def apply(self, model):
        clip = towers_of(model).clip
        norms = {"image": clip.visual.ln_post, "text": clip.ln_final}
        for norm in map(norms.get, self.settings.parts):
            norm.register_parameter("shift", torch.nn.Parameter(torch.full_like(norm.bias, self.settings.by)))
            norm.register_forward_hook(lambda norm, _, rows: rows + norm.shift)

    def added(self, name):
        return name.endswith(".shift")

    def merged(self, state):
        plain = {name: value.clone() for name, value in state.items() if not self.added(name)}
        for name in filter(self.added, state):
            plain[name.replace(".shift", ".bias")] += state[name]
        return plain


@pytest.fixture
def shift(monkeypatch):
    """A registered adapter."""
    entry = Entry(ShiftConfig, "test_adapters:Shift")
    monkeypatch.setitem(ADAPTERS, "shift", entry)
    monkeypatch.setattr(Entry, "load", lambda self: Shift)


def settings(task=ContrastiveConfig, **changes):
    return task(**PLACES, **changes)


def test_what_is_added_comes_after_locks_and_before_checkpointing(shift):
    config = settings(
        seed=5,
        model=ModelConfig(init="x", locked=["image"]),
        adapters={"mine": ShiftConfig()},
        train=TrainConfig(grad_checkpointing=["text"]),
    )
    check(config)
    adapters = adapters_of(config)
    assert [type(adapter).__name__ for adapter in adapters] == ["Lock", "Shift", "GradCheckpointing"]
    assert (adapters[1].settings.parts, adapters[1].seed) == (["text"], 5)  # not the locked one
    assert described(config.added()) == {"adapters": {"mine": {"type": "shift", "parts": ["text"], "by": 1.0}}}
    assert described(settings().added()) == {}


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (
            ContrastiveConfig,
            {"adapters": {"a": ShiftConfig(parts=["imgae"])}},
            r"adapters.a.parts .*did you mean 'image'",
        ),
        (
            ContrastiveConfig,
            {"adapters": {"a": ShiftConfig(), "b": ShiftConfig()}},
            r"adapters.b.type .*each type once",
        ),
        (
            ClassifyConfig,
            {"adapters": {"a": ShiftConfig(parts=["text"])}},
            r"adapters.a.parts .*parts of the model: image",
        ),
        (ClassifyConfig, {"adapters": {"a": ShiftConfig()}, "mode": "linear"}, r"adapters.a.parts .*image is locked"),
    ],
)
def test_it_is_added_once_to_what_learns(shift, task, changes, words):
    with pytest.raises(UsageError, match=words):
        check(settings(task, **changes))
    locked = ModelConfig(init="x", locked=["image"])
    with pytest.raises(UsageError, match=r"adapters.a.parts .*got \['image'\]; expected towers that learn"):
        check(settings(model=locked, adapters={"a": ShiftConfig(parts=["image"])}))


def test_settings_name_what_is_added(shift, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: [{urls: x}]}\nrun: {dir: x}\n")
    for word, want in (("adapters=shift", 1.0), ("adapters={shift: {by: 2.0}}", 2.0), ("adapters.shift.by=3.0", 3.0)):
        assert load_config(ContrastiveConfig, path, [word]).adapters == {"shift": ShiftConfig(by=want)}
    with pytest.raises(UsageError, match=r"adapters.shfit has no such type.*did you mean 'shift'"):
        load_config(ContrastiveConfig, path, ["adapters=shfit"])


def shifted(by=0.5, seed=0):
    config = settings(adapters={"shift": ShiftConfig(by=by)})
    model = tiny.build(seed)
    adapt(model, adapters_of(config))
    return model.eval(), config


def features(model):
    images, tokens = tiny.batch(model, 4)
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(tokens)])


def test_whoever_opens_a_checkpoint_gets_what_was_added_merged(shift, tmp_path):
    model, config = shifted()
    plain = tiny.build().eval()
    assert (features(model) - features(plain)).abs().max() > 0.01
    description = describe(model.spec, **described(config.added()))
    run = checkpoints.write(tmp_path / "run", 3, model, description=description)
    opened = load_trained(run)
    assert opened.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(features(opened), features(model))
    plain.load_state_dict(merge(model.adapters, model.state_dict()))  # as the moving average is evaluated
    torch.testing.assert_close(features(plain), features(model))
    assert model.export_state().keys() == plain.export_state().keys()
    again, _ = shifted(by=7.0, seed=1)
    CheckpointReader(run).load_into(again)
    assert torch.equal(features(again), features(model))
    with pytest.raises(UserError, match=r"holds other weights than its model.json describes"):
        CheckpointReader(run).load_into(tiny.build())


def test_a_run_starts_beside_what_it_adds(shift):
    model, _ = shifted()
    weights = tiny.build(3).export_state()
    report = initialise(model, weights, "another run")
    assert not report.missing
    assert all(torch.equal(value, weights[key]) for key, value in model.clip.state_dict().items() if "bias" in key)
    assert (model.clip.ln_final.shift == 0.5).all()


def test_a_classifier_goes_on_with_what_was_added_and_is_opened_without(shift, tmp_path):
    config = settings(ClassifyConfig, adapters={"shift": ShiftConfig()})
    towers = tiny.build()
    model = Classifier(towers, ("a", "b"), towers.clip.text_projection.detach()[:2], 3.0).eval()
    adapt(model, adapters_of(config))
    head = {"classes": ["a", "b"], "scale": 3.0}
    description = describe(model.spec, head=head, **described(config.added()))
    run = checkpoints.write(tmp_path / "run", 3, model, description=description)
    reader = CheckpointReader(run)
    resumed = classifier_of(reader)
    adapt(resumed, adapters_of(config))
    reader.load_into(resumed)
    assert resumed.state_dict().keys() == model.state_dict().keys() > load_classifier(run).state_dict().keys()
    images, _ = tiny.batch(towers, 4)
    with torch.no_grad():
        assert torch.equal(resumed.eval().scores(images), model.scores(images))
        torch.testing.assert_close(load_classifier(run).scores(images), model.scores(images))


@pytest.mark.parametrize(
    "given",
    [
        *(
            3,
            [1],
            {"a": 3},
            {"a": {}},
            {"a": {"type": "shfit"}},
            {"a": {"type": ["shift"]}},
            {"a": {"type": "shift", "x": 1}},
        ),
        *({"a": {"type": "shift", "by": by}} for by in (-1.0, "1", None, float("nan"))),
    ],
)
def test_a_description_is_looked_at(shift, given):
    with pytest.raises(UserError, match=r"model.json describes adapters that are none; got .*; expected .*shift"):
        adapters_in({"adapters": given}, "model.json")
