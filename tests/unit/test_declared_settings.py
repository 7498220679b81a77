"""How settings are declared: every default is good, every number has its ends, every rule names a setting."""

import ast
import inspect
import math
import textwrap

import pytest

from pretrain.config.check import check, leaves, names, value_at
from pretrain.config.declare import Fault, Number, Section, number, rule_of
from pretrain.config.tree import DataConfig, ImageDataConfig, ImageSource, ModelConfig, Phase, RunConfig, Source
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.towers.adapt import AdaptedConfig, AdapterConfig

ROOTS = (ContrastiveConfig, ClassifyConfig)


def sections(kind=Section):
    """All of the house's."""
    return [kind, *(below for one in kind.__subclasses__() for below in sections(one))]


def example(kind):
    """A section with an item in each of its lists and maps, so that what lies in them can be named."""
    if issubclass(kind, ImageDataConfig):
        return kind([Source("a")])
    if kind is AdaptedConfig:
        return kind(adapters={"0": AdapterConfig()})
    return kind("a", [Phase("1 epoch", image_size=1)]) if kind is ModelConfig else kind()


@pytest.mark.parametrize("kind", ROOTS)
def test_every_default_is_good_or_asked_for(kind):
    check(kind(run=RunConfig("x"), data=DataConfig([Source("x")])))
    assert {name for name, value in leaves(kind()) if value == "???"} == {"run.dir"}


def test_every_number_has_its_ends():
    numbers = 0
    for name, one, hint in (setting for kind in ROOTS for setting in names(kind)):
        if {"int", "float"}.isdisjoint(str(hint).replace("'", " ").replace("[", " ").replace(",", " ").split()):
            continue
        rule, numbers = rule_of(one), numbers + 1
        if type(rule).__name__ == "Choice":
            continue
        assert isinstance(rule, Number), name
        assert not rule.holds(math.nan)
        for end, inside in ((rule.ge, True), (rule.le, True), (rule.gt, False), (rule.lt, False)):
            assert end is None or rule.holds(end) is inside, name
    assert numbers > 40


@pytest.mark.parametrize("ends", [{}, {"ge": 0}, {"lt": 1}, {"ge": 0, "gt": 0, "le": 1}, {"ge": 0, "le": 1, "lt": 1}])
def test_a_number_without_two_ends_cannot_be_declared(ends):
    with pytest.raises(TypeError, match="one lower end"):
        number(0.5, **ends)


def named_faults(kind):
    """What the `Fault(...)` in a section's own check() name, variables apart; what a loop counts stands as 0."""
    if "check" not in vars(kind):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind.check)))):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Fault"
        if called and not isinstance(node.args[0], ast.Name):
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            yield "".join(part.value if isinstance(part, ast.Constant) else "0" for part in parts)


@pytest.mark.parametrize("kind", sections())
def test_every_fault_names_a_setting(kind):
    for name in named_faults(kind):
        value_at(example(kind), name)


def test_a_fault_that_names_nothing_cannot_pass():
    class Wrong(Section):
        def check(self):
            yield Fault("nothing", "a rule")

    assert list(named_faults(ImageSource)) == ["repeat"]  # the walk above has something to look at
    with pytest.raises(AttributeError):
        check(Wrong())
