"""What objectives need beside images and texts: joined with the user's settings, given to a model, found again."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import tiny
from data_tools.errors import UsageError, UserError
from pretrain.config.check import check
from pretrain.config.declare import Fault, Section, choice, number
from pretrain.config.registry import Entry
from pretrain.config.tree import DataConfig, Source
from pretrain.engine.opening import Opened
from pretrain.objectives import OBJECTIVES, InfoNCEConfig, ObjectiveConfig
from pretrain.stream.fields import FIELDS, FieldConfig
from pretrain.tasks import ClassifyConfig, ContrastiveConfig, classify, contrastive
from pretrain.tasks.needs import needs_of
from pretrain.towers.heads import HEADS, HeadConfig
from pretrain.towers.heads.equip import Equipment, equipment_in
from pretrain.towers.heads.head import Head
from pretrain.towers.initialise import InitReport


@dataclass(frozen=True)
class ToyHeadConfig(HeadConfig):
    type: str = choice("toy")
    layers: int = number(2, ge=1, le=8)
    width: int | None = number(None, ge=1, le=99)


@dataclass(frozen=True)
class ToyFieldConfig(FieldConfig):
    type: str = choice("vector")
    size: int | None = number(3, ge=1, le=99)

    def check(self):
        if self.size is None:
            yield Fault("size", "how many numbers there are")

    ENCODER: ClassVar[str | None] = "stored"

    @property
    def width(self):
        return self.size


@dataclass(frozen=True)
class ToyObjectiveConfig(ObjectiveConfig):
    type: str = choice("toy_objective")

    heads: ClassVar = {"reader": "toy"}
    extra_fields: ClassVar = {"teacher": {"type": "vector", "size": 5}}

    def check_widths(self, widths):
        if widths["teacher"] == 13:
            yield Fault("weight", "another one for 13 numbers")


@dataclass(frozen=True)
class SizelessConfig(ToyObjectiveConfig):
    extra_fields: ClassVar = {"teacher": {"type": "vector", "size": None}}


@dataclass(frozen=True)
class DeepConfig(ToyObjectiveConfig):
    heads: ClassVar = {"reader": {"type": "toy", "layers": 4}}


class ToyHead(Head):
    def __init__(self, settings, model):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(model.size_of("teacher"), 2) for _ in range(settings.layers))


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setitem(HEADS, "toy", Entry(ToyHeadConfig, f"{__name__}:ToyHead"))
    monkeypatch.setitem(FIELDS, "vector", Entry(ToyFieldConfig, f"{__name__}:Nobody"))
    monkeypatch.setitem(OBJECTIVES, "toy_objective", Entry(ToyObjectiveConfig, f"{__name__}:Nobody"))


def config(**changes):
    data = DataConfig(train=[Source(urls="x")])
    return replace(ContrastiveConfig(data=data, objectives={"toy_objective": ToyObjectiveConfig()}), **changes)


def test_needs_are_the_defaults_unless_the_user_sets_them():
    plain = config().needs
    assert plain.heads == {"reader": ToyHeadConfig()}
    assert plain.fields == {"teacher": ToyFieldConfig(size=5)}
    mine = config(heads={"reader": ToyHeadConfig(layers=4)}, fields={"teacher": ToyFieldConfig(size=9)}).needs
    assert mine.heads["reader"].layers == 4
    assert mine.fields["teacher"].width == 9
    assert needs_of({"infonce": InfoNCEConfig()}, {}, {}).heads == {}


@dataclass(frozen=True)
class OtherHeadConfig(Section):
    type: str = "other"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {"fusion": ToyHeadConfig()}}, "heads.*those that the objectives read: reader.*leave fusion out"),
        ({"heads": {"reader": OtherHeadConfig()}}, "heads.reader.type.*toy"),
        (
            {"objectives": {"toy_objective": DeepConfig()}, "heads": {"reader": ToyHeadConfig(width=7)}},
            "heads.reader.layers.*got 2.*4, as the objective needs it.*heads.reader='{type: toy, layers: 4}'",
        ),
        (
            {"objectives": {"one": DeepConfig(), "other": ToyObjectiveConfig()}},
            "objectives.*need one heads.reader, and these need .*4.* and toy",
        ),
        ({"objectives": {"loss": InfoNCEConfig()}}, "objectives.*names other than loss"),
        ({"objectives": {"a.b": InfoNCEConfig()}}, "objectives.*'a.b'.*letters, digits"),
        ({"fields": {"t/x": ToyFieldConfig()}}, "fields.*'t/x'.*letters, digits"),
        ({"fields": {"more": ToyFieldConfig()}}, "fields.*those that the objectives read: teacher"),
        ({"heads": {"reader": ToyHeadConfig(layers=0)}}, "heads.reader.layers"),
        (
            {"objectives": {"toy_objective": SizelessConfig()}},
            "fields.*settings of teacher with size: how many numbers.*fields.teacher='{type: vector, size: ...}'",
        ),
        ({"fields": {"teacher": ToyFieldConfig(size=13)}}, "objectives.toy_objective.weight.*got 1.0.*13 numbers"),
        ({"data": DataConfig(train=[Source(urls="x")], optional=["sound"])}, "data.optional.*image, text, teacher"),
        ({"data": DataConfig(train=[Source(urls="x")], optional=["text", "image"])}, "data.optional.*leaves"),
    ],
)
def test_what_nobody_reads_is_an_error(changes, message):
    run = replace(config().run, dir="run")
    with pytest.raises(UsageError, match=message):
        check(config(run=run, **changes))


def test_parts_are_the_towers_and_the_heads():
    assert config().parts == ("image", "text", "reader")


def equipment():
    return Equipment({"teacher": "stored"}, {"teacher": 5}, {"reader": ToyHeadConfig()})


def test_a_model_is_equipped_by_the_seed_and_the_name_alone():
    first, second, other = tiny.build(0), tiny.build(0), tiny.build(0)
    equipment().give(first, seed=3)
    torch.rand(5)
    before = torch.get_rng_state()
    equipment().give(second, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    replace(equipment(), heads={"another": ToyHeadConfig()}).give(other, seed=3)
    for one, two, three in zip(
        first.heads["reader"].parameters(),
        second.heads["reader"].parameters(),
        other.heads["another"].parameters(),
        strict=True,
    ):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    assert first.heads["reader"].layers[0].in_features == 5
    assert not any("heads" in name for name in first.export_state())
    assert first.export_state().keys() == tiny.build(0).export_state().keys()


def test_a_classifier_takes_no_heads_along(monkeypatch):
    trained = tiny.build()
    equipment().give(trained, seed=0)
    monkeypatch.setattr(classify, "open_model", lambda *_: (trained, InitReport("a run")))
    towers, lines = classify._towers(ClassifyConfig(init="a run"))
    assert lines[-1].endswith("\nHeads that stay behind: reader.")
    assert towers.state_dict().keys() == tiny.build().state_dict().keys()


def test_heads_of_the_model_that_a_run_starts_from_are_taken_where_they_fit(monkeypatch):
    taught, model = tiny.build(1), tiny.build(0)
    equipment().give(taught, seed=1)
    both = replace(equipment(), heads={"reader": ToyHeadConfig(), "other": ToyHeadConfig(layers=1)})
    both.give(model, seed=0)
    heads = taught.heads.state_dict()
    opened = Opened("a run", taught.export_state(), taught.spec, "gelu", heads=heads)
    monkeypatch.setattr(contrastive, "open_weights", lambda _: opened)
    given = config().model
    report = contrastive.load_init(model, config(model=replace(given, init="a run")))
    assert report.notes[-2:] == ["head reader: loaded", "head other: starts at random"]
    assert all(
        torch.equal(model.heads["reader"].state_dict()[key.removeprefix("reader.")], heads[key]) for key in heads
    )


def test_what_is_described_is_found_again():
    assert equipment_in({"spec": 1, **equipment().described()}, "model.json") == equipment()
    assert Equipment().described() == {}
    assert equipment_in({"spec": 1}, "model.json") == Equipment()


@pytest.mark.parametrize(
    "told",
    [
        5,
        {},
        {"encoder_of": {}, "sizes": {}, "heads": {"reader": 3}},
        {"encoder_of": {}, "sizes": {}, "heads": {"reader": {"type": "nothing"}}},
        {"encoder_of": {}, "sizes": {}, "heads": {"reader": {"type": "toy", "layers": 10**9}}},
        {"encoder_of": {}, "sizes": {}, "heads": {"reader": {"type": "toy", "layers": None}}},
        {"encoder_of": {"teacher": "os.system"}, "sizes": {}, "heads": {}},
        {"encoder_of": {}, "sizes": {"teacher": 10**12}, "heads": {}},
    ],
)
def test_a_description_that_is_none_is_refused(told):
    with pytest.raises(UserError, match=r"model\.json describes heads that are none"):
        equipment_in({"equipment": told}, "model.json")
