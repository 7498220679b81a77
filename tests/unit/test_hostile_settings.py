"""Every setting of both trees with values that no one means: a UsageError that names it at once, or a legal value."""

import contextlib
import math
import os
import time
from dataclasses import fields
from typing import get_origin

import pytest
import torch

from data_tools.errors import UsageError
from pretrain.config.batch import check_world_size, local_batch
from pretrain.config.check import leaves, names
from pretrain.config.durations import duration_steps, parse_seconds, parse_steps
from pretrain.config.reading import load_config
from pretrain.config.registry import registry_of
from pretrain.objectives import OF_TOWERS
from pretrain.stream.order import Order
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.train import seed_step

PLAIN = "run: {dir: a}\ndata: {train: [{urls: s}]}\n"
BASE = {
    ContrastiveConfig: PLAIN + "model: {phases: [{until: 1 epoch, image_size: 64}]}\n",
    ClassifyConfig: PLAIN + "init: b\n",
}
OWN = {name for name, *_ in names(ClassifyConfig)} - {name for name, *_ in names(ContrastiveConfig)} - {"classes"}
THINGS = {one.name: list(registry_of(one)) for one in fields(ContrastiveConfig) if registry_of(one) is not None}


_NEEDS = {name: entry.settings().needs() for name, entry in OF_TOWERS.items()}
_NAMES = {}  # of a head or a field that an objective needs, by its type
for one, need in [pair for both in _NEEDS.values() for needs in both for pair in needs.items()]:
    _NAMES.setdefault(need if isinstance(need, str) else need["type"], one)


def filled(name):
    """`name` with the name of a thing: for NAME a part of the model, or the first thing that there is (None: nothing);
    for a type the name under which an objective needs one."""
    before, step, after = name.partition(".NAME.")
    key = next(iter(THINGS.get(before, ["image"])), None)
    if step:
        return key and f"{before}.{key}.{after}"
    place, _, rest = name.partition(".")
    kind, _, setting = rest.partition(".")
    needed = _NAMES.get(kind, kind) if place in ("heads", "fields") else kind
    return f"{place}.{needed}.{setting}" if setting else name


FIELDS = [(ContrastiveConfig, filled(name), hint) for name, _, hint in names(ContrastiveConfig) if filled(name)]
FIELDS += [(ClassifyConfig, name, hint) for name, _, hint in names(ClassifyConfig) if name in OWN]


def readers(name):
    """Words without which a setting is refused whatever it holds: the objectives that read a head or a field, the size
    of stored fields that these read, the corpus of an evaluator."""
    needs = {one: {**heads, **more} for one, (heads, more) in _NEEDS.items()}
    place, _, rest = name.partition(".")
    which = rest.partition(".")[0]
    if place == "evaluators" and not rest.endswith(".data"):
        return [f"evaluators.{which}.data=s"]
    found = [one for one, needed in needs.items() if place in ("heads", "fields") and which in needed]
    asking = [which] if place == "objectives" and which in needs else found
    stored = {field for one in asking for field, need in needs[one].items() if need == "embedding"}
    words = [f"objectives=[{','.join(found)}]"] if found else []
    return words + [f"fields.{field}={{type: embedding, size: 8}}" for field in sorted(stored)]


EVERYWHERE = ["''", "???", "[]", "${nothing.here}"]
NUMBERS = [".inf", ".nan", "-1", "1e308", "1e-320", str(10**23), "9" * 400]
TEXTS = ['"a\\0b"', '"\\e[31m\\n"', "x" * 5000, "9" * 400 + " steps", "1e99 epochs", "-1 steps", "1-" + "9" * 5000]
MORE = [
    *("-.inf", "1e400", "-1e400", "-1e308", "-0.0", "0", "1e9999999", str(-(10**23)), "9" * 5000, "0x" + "f" * 40),
    *(str(2**63), str(2**64), "1_0", '"  "', "\ud800", "caf\u00e9", "null", "true", "{}", "[[1]]", "[1, 2, 3]"),
    *("[[1], 2]", "[{a: 1}]"),
    *("[.nan, .nan]", "[0.5]", "{a: 1}", "!!python/name:os.system", "!!binary aGk=", "2020-01-01", "0-0", "5-1"),
    *("${oc.env:NO_SUCH_VARIABLE_HERE}", "${seed", "${oc.nothing:1}", "&a [*a]", '"a\\nb"'),
    *(f"{n} {unit}" for unit in ("steps", "epochs", "samples", "minutes")
      for n in ("9" * 400, "nan", "inf", "0", "0.5", "1" + "_1" * 9, "0." + "0" * 300 + "1")),
]  # fmt: skip


def is_number(hint):
    return "int" in str(hint) or "float" in str(hint)


def _values(hint):
    """The most telling ones; all of them (five minutes) with ALL_HOSTILE_SETTINGS=1."""
    if os.environ.get("ALL_HOSTILE_SETTINGS"):
        return EVERYWHERE + NUMBERS + TEXTS + MORE
    nested = ["[[1], 2]", "[{a: 1}]"] if get_origin(hint) in (list, tuple) else []
    return nested + EVERYWHERE + (NUMBERS if is_number(hint) else TEXTS if hint is not bool else [])


def _use(config):
    """What the program makes of legal values before it opens a file: UsageError or nothing."""
    seed_step(config.seed, 10**6, 4095)
    torch.manual_seed(config.seed)
    Order([10], config.seed, 1, config.data.window)
    assert all(math.isfinite(value) for _, value in leaves(config) if isinstance(value, float))
    for text in (config.train.duration, config.optim.warmup, config.log.every, config.checkpoint.every):
        steps = 0 if text is None else duration_steps(text, "x", 10**6, config.train.global_batch)
        assert float(steps * config.train.global_batch) < math.inf
    if config.guard.hang_timeout is not None:
        assert 0 < parse_seconds(config.guard.hang_timeout, "x") <= 1500
    if config.profile.steps is not None:
        parse_steps(config.profile.steps, "x")
    for world_size in (1, 7, 4096):
        with contextlib.suppress(UsageError):
            local_batch(config, world_size)


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_hostile_value_is_one_line_naming_the_field_or_legal(tmp_path, kind, name, hint):
    path = tmp_path / "config.yaml"
    path.write_text(BASE[kind])
    torn, words = name.rsplit(".", 1)[-1], readers(name)
    for value in _values(hint):
        started = time.process_time()
        try:
            _use(load_config(kind, path, [*words, f"{name}={value}"]))
        except UsageError as error:
            said = str(error)
            unread = words and "value fields breaks" in said  # it named others than the words do
            assert torn in said or unread, f"{value[:40]}: {said}"
            assert said.isprintable(), said
            assert len(said) < 1000
        assert time.process_time() - started < 1, value[:40]


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "not valid YAML"),
        ("a: &x [*x]", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
        ("a: " + "{b: " * 400 + "1" + "}" * 400, "not valid YAML"),
        ("!!python/object/apply:os.system ['touch owned']", "not valid YAML"),
        ("seed: !!python/name:os.system", "not valid YAML"),
        ("- 1", "no tree of settings"),
        ("5", "not valid YAML"),
        ("seed: 1\nseed: 2", "not valid YAML"),
        ("seed: 1\n---\nseed: 2", "not valid YAML"),
        ("\x00\x01\x02", "not valid YAML"),
        ("seed: " + "9" * 6000, "not valid YAML"),
        ("1: 2", "unknown config key"),
        ("data:", "data"),
        ("optim: 5", "optim"),
        ("optim: [1]", "optim"),
        ("optim.lr: 5", "optim.lr"),
        ("seed: ${seed}", "'seed' is wrong; got Recursive interpolation"),
        ("optim: {lr: '${optim.eps}', eps: '${optim.lr}'}", "'optim.lr' is wrong; got Recursive"),
        ("#" * (1 << 21), "no file of settings"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError, match=said) as caught:
        load_config(ContrastiveConfig, path, ["run.dir=a", "data.train=[{urls: s}]"] if "data" not in text else [])
    assert time.process_time() - started < 1
    assert str(caught.value).isprintable()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "word",
    ["[=1", "a..b=1", ".=1", "=1", "optim", "data.train.99.urls=x", "data.train.x=1", "data.train.-7.urls=x",
     "optim.lr.x=1", "seed.x=1", "optim.lr=[", "run.dir=@x", "run.dir={000..009}.tar", "optim.lr=\x00"],
)  # fmt: skip
def test_an_override_that_cannot_be_is_named(tmp_path, word):
    path = tmp_path / "config.yaml"
    path.write_text(BASE[ContrastiveConfig])
    with pytest.raises(UsageError) as caught:
        load_config(ContrastiveConfig, path, [word])
    message = str(caught.value)
    assert word.partition("=")[0].rsplit(".", 1)[-1] in message
    assert message.count("config value") + message.count("override ") + message.count("unknown config key") == 1


def test_binary_and_absent_files(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00\xd8" * 10)
    for path, said in (
        (tmp_path / "a", "not valid YAML"),
        (tmp_path, "is no file; got a folder"),
        ("/dev/zero", "got a device"),
        ("a\0b", "is missing"),
        ("x" * 5000, "is missing"),
    ):
        with pytest.raises(UsageError, match=said):
            load_config(ContrastiveConfig, path, [])


def test_the_training_corpus_may_be_named_alone(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: a}\ndata: {train: old}\n")
    assert [source.urls for source in load_config(ContrastiveConfig, path).data.train] == ["old"]
    for word, urls in (
        ("data.train=new", ["new"]),
        ("data.train={urls: c, repeat: 2}", ["c"]),
        ("data.train=[a, {urls: b, repeat: 2}]", ["a", "b"]),
    ):
        assert [source.urls for source in load_config(ContrastiveConfig, path, [word]).data.train] == urls
    assert load_config(ContrastiveConfig, path, ["data.train=a", "data.train.0.repeat=3"]).data.train[0].repeat == 3
    with pytest.raises(UsageError, match=r"data\.train\.1\.urls.*corpus of a source before.*repeat: 2"):
        load_config(ContrastiveConfig, path, ["data.train=[a, a]"])
    two = load_config(ContrastiveConfig, path, ["data.train=[a, {urls: a, captions: 'json:other'}]"])
    assert len(two.data.train) == 2


def test_the_ranks_that_fit_a_huge_batch_are_found_at_once():
    started = time.process_time()
    with pytest.raises(UsageError, match="6 or 8 ranks"):
        check_world_size(2**20 * 3 * 5, 7)
    with pytest.raises(UsageError, match="divisible"):
        check_world_size(2**30 - 35, 7)  # a prime
    assert time.process_time() - started < 0.5
