"""Evaluators by their registry: in a run, from the command line, and in records of before."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from data_tools.errors import UsageError
from evaluate_fakes import HEADS, FakeBench, FakeTowers, Judging
from pretrain.config.reading import read_section
from pretrain.evaluate import EVALUATORS, OF_CLASSIFIERS, ClassificationConfig, RetrievalConfig, command, pairs
from pretrain.evaluate.cli import _parser, _settings
from pretrain.evaluate.evaluator import build_evaluator, build_evaluators, remarks_of, run_evaluators
from pretrain.evaluate.pairs import MinimalPairs
from pretrain.objectives import InfoNCEConfig, MarginConfig
from pretrain.towers.classifier import Classifier

CLASSES = ("cat", "dog", "red bus", "tree", "house", "street", "sea")
OTHERS: dict[str, dict] = {}  # settings without a default, by type


@pytest.fixture(autouse=True)
def minimal_pairs(monkeypatch):
    found = MinimalPairs(torch.tensor([[1, 2], [5, 9], [22, 13]]), ("colour", "place", "colour"))
    monkeypatch.setattr(pairs, "read_pairs", lambda corpus: found)


def settings_of(name: str):
    return EVALUATORS[name].settings(data="x", **OTHERS.get(name, {}))


def as_classifier(inputs, want):
    """Towers with a head of as many scores as there are classes."""
    outputs = FakeTowers()(inputs, want)
    return outputs | {"local": {"classes": outputs["rows"]["image"][:, : len(CLASSES)]}}


@pytest.mark.parametrize("name", EVALUATORS)
def test_metrics_are_among_those_that_the_settings_name(name):
    """What `checkpoint.keep_best` is checked against, before anything is built."""
    settings = settings_of(name)
    outcome = build_evaluator(settings, FakeBench(40, 8, labels=7, names=CLASSES, heads=HEADS))(Judging())
    assert set(outcome.metrics) == set(settings.metrics(classifier=False))
    assert set(outcome.chance) <= set(outcome.metrics)
    assert all(isinstance(value, float) for value in outcome.metrics.values())
    if name in OF_CLASSIFIERS:
        bench = FakeBench(40, 8, labels=7, names=CLASSES, classes=CLASSES)
        outcome = build_evaluator(settings, bench)(as_classifier)
        assert set(outcome.metrics) == set(settings.metrics(classifier=True))


def test_a_run_gives_plain_names_to_what_is_called_by_its_type_and_a_prefix_to_others():
    settings = {"retrieval": RetrievalConfig(data="x"), "zero_shot": ClassificationConfig(data="x")}
    bench = FakeBench(40, 8, labels=7, names=CLASSES, objectives={"a": InfoNCEConfig(), "b": MarginConfig(weight=0.5)})
    evaluators = build_evaluators(settings, bench)
    towers = FakeTowers()
    found = run_evaluators(evaluators, towers)
    alone = {name: evaluator(towers).metrics for name, evaluator in evaluators.items()}
    want = alone["retrieval"] | {f"zero_shot_{name}": value for name, value in alone["zero_shot"].items()}
    assert found == want
    assert remarks_of(evaluators, SimpleNamespace(hashes=b"o" * 16)) == []
    warnings = remarks_of(evaluators, bench.corpus("x"))
    assert [line.split()[6] for line in warnings] == ["evaluators.retrieval", "evaluators.zero_shot"]


def test_the_validation_loss_is_the_weighted_sum_of_all_objectives_over_pairs():
    values = []
    for objectives in (
        {"a": InfoNCEConfig()},
        {"b": MarginConfig()},
        {"a": InfoNCEConfig(weight=2), "b": MarginConfig()},
    ):
        bench = FakeBench(40, 8, objectives=objectives)
        values.append(build_evaluator(RetrievalConfig(data="x"), bench)(FakeTowers()).metrics["validation_loss"])
    assert values[2] == pytest.approx(2 * values[0] + values[1], rel=1e-12)
    nothing = build_evaluator(RetrievalConfig(data="x"), FakeBench(40, 8, objectives={}))(FakeTowers())
    assert "validation_loss" not in nothing.metrics  # of objectives over single samples alone there is none


# ---- records of before ----------------------------------------------------------------------------------------------

# (task, precision, options, class names of the corpus, whether of a classifier, settings, key), as commit aff949b wrote
# them for a model of digest mm...m (a classifier of digest cc...c with the classes cat, dog) and a corpus dd...d.
RECORDS = [
    ("retrieval", "fp32", (), (), False, {"loss_batch": 256}, "c3c001514ab38934014d79a5dea71b2d"),
    (
        *("retrieval", "bf16", ("--loss-batch", "64", "--captions", "lines"), (), False),
        *({"loss_batch": 64, "captions": "lines"}, "9199583549104c990f674d43e8f50015"),
    ),
    ("pairs", "fp32", (), (), False, {}, "4cb6365c0278a634bd3938c5ea903d34"),
    ("pairs", "fp32", ("--captions", "txt"), (), False, {"captions": "txt"}, "c919bbedf7a65065bbbdeb580e7480c7"),
    ("classification", "fp32", (), ("cat", "dog"), False, {"templates": "photo"}, "9641241b33be78e07110e052966e2f0a"),
    (
        *("classification", "fp32", ("--templates", "simple", "--classes", "{names}"), ("cat", "dog"), False),
        *({"templates": "simple"}, "825fa2a20145bc0ebb3d2d3c4498b9ab"),
    ),
    ("classification", "fp32", (), ("dog", "cat"), True, {}, "37de7d4baf0757677c6a9120e07367bb"),
    ("classification", "fp32", (), (), True, {}, "1f1287c5119266f8e376202e6ee3319a"),
]


@pytest.mark.parametrize(("task", "precision", "words", "names", "trained", "shown", "key"), RECORDS)
def test_a_record_of_before_is_known_again(monkeypatch, tmp_path, task, precision, words, names, trained, shown, key):
    (tmp_path / "names").write_text("dog\ncat\n")
    words = [word.format(names=tmp_path / "names") for word in words]
    options = _parser().parse_intermixed_args(["--model", "runs/a", "--task", task, "--data", "shards", *words])
    options.precision = precision
    monkeypatch.setattr(command, "model_digest", lambda *_: "m" * 32)
    monkeypatch.setattr(command, "classifier_digest", lambda *_: "c" * 32)
    bench = FakeBench(4, 2, labels=2, names=names, classes=("cat", "dog") if trained else ())
    record = command._describe(options, _model(trained), build_evaluator(_settings(options), bench))
    assert record["task"] == task
    assert record["settings"] == {"precision": precision, **shown}
    assert record["key"] == key


def _model(trained: bool):
    """Of either kind, without weights."""
    spec = SimpleNamespace(name="t", model_cfg={}, preprocess_cfg={})
    model = torch.nn.Module.__new__(Classifier) if trained else Namespace(spec=spec, export_state=dict)
    if trained:
        torch.nn.Module.__init__(model)
        model.towers = SimpleNamespace(spec=spec)
    return model


# ---- the command line -----------------------------------------------------------------------------------------------


def _asked(task: str, *words: str):
    line = ["--model", "m", "--task", task, "--data", "d", *words]
    return _settings(_parser().parse_intermixed_args(line))


def test_settings_come_as_options_and_as_words():
    assert _asked("retrieval") == RetrievalConfig(data="d")
    assert _asked("retrieval", "--loss-batch", "8") == _asked("retrieval", "loss_batch=8")
    assert _asked("retrieval", "loss_batch=8", "captions=lines") == RetrievalConfig(
        data="d", captions="lines", loss_batch=8
    )
    assert _asked("classification", "--templates", "openai").templates == "openai"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pairs", "--templates", "openai"), "--templates belongs to --task classification; got --task pairs"),
        (("classification", "--captions", "x"), "--captions belongs to --task retrieval and pairs"),
        (("pairs", "--loss-batch", "8"), "--loss-batch belongs to --task retrieval"),
        (("retrieval", "--loss-batch", "1"), "--loss-batch"),
        (("retrieval", "loss_batch=1"), "loss_batch breaks its rule; got 1; expected 2 <= value"),
        (("retrieval", "loss_batch=many"), "config value 'loss_batch' is wrong"),
        (("retrieval", "los_batch=8"), "unknown config key 'los_batch'.*of --task retrieval.*mean 'loss_batch'"),
        (("retrieval", "8"), "override '8' is not understood"),
        (("retrieval", "data=other"), "data is given twice"),
        (("retrieval", "type=pairs"), "type is given twice"),
        (("retrieval", "--loss-batch", "8", "loss_batch=9"), "loss_batch is given twice"),
    ],
)
def test_a_wrong_setting_is_one_line(words, said):
    with pytest.raises(UsageError, match=said) as caught:
        _asked(*words)
    assert "\n" not in str(caught.value)


def test_a_setting_that_is_missing_is_asked_for():
    with pytest.raises(UsageError, match="'data' is not set; remedy: pass data=VALUE"):
        read_section(RetrievalConfig, {}, [], "--task retrieval")
