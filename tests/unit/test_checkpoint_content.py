"""Checkpoints that came back from elsewhere: damaged, copied, renamed, or made to look like one."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import tiny
from data_tools.errors import UserError
from pretrain.engine import committed
from pretrain.engine.committed import Retention, newest_intact, step_of
from pretrain.engine.fragments import saved_parameters
from pretrain.engine.weights import CheckpointReader, load_trained, resolve_checkpoint
from pretrain.stream.position import Position


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("run"), 6)


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run" / committed.FOLDER / made.name)


def test_a_checkpoint_is_read_whole(checkpoint):
    want = tiny.build().state_dict()
    for place in (checkpoint, checkpoint.parent.parent, str(checkpoint)):
        got = load_trained(place).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


class Rebuilt(torch.nn.Module):
    """A linear layer in two modules that goes by the names of one."""

    def __init__(self):
        super().__init__()
        self.inner, self.bias = torch.nn.Linear(2, 3, bias=False), torch.nn.Parameter(torch.randn(3))
        self.register_state_dict_post_hook(self._outward)
        self.register_load_state_dict_pre_hook(self._inward)

    def forward(self, rows):
        return self.inner(rows) + self.bias

    @staticmethod
    def _outward(module, state, prefix, _):
        state[f"{prefix}weight"] = state.pop(f"{prefix}inner.weight")

    @staticmethod
    def _inward(module, state, prefix, *_):
        state[f"{prefix}inner.weight"] = state.pop(f"{prefix}weight")


def test_parameters_go_by_the_names_of_the_state_dict(tmp_path):
    """What was saved of a rebuilt module is a plain one's, and the reverse; tied parameters are kept once."""
    rebuilt, plain = (torch.nn.Sequential(layer, torch.nn.Linear(3, 1)) for layer in (Rebuilt(), torch.nn.Linear(2, 3)))
    assert [name for name, _ in saved_parameters(rebuilt)] == ["0.bias", "0.weight", "1.weight", "1.bias"]
    assert [id(p) for _, p in saved_parameters(rebuilt)] == [id(p) for p in rebuilt.parameters()]
    for number, (saved, other) in enumerate(((rebuilt, plain), (plain, rebuilt))):
        run = checkpoints.write(tmp_path / str(number), 1, saved, description={"spec": None})
        CheckpointReader(run).load_into(other)
        pictures = torch.randn(4, 2)
        torch.testing.assert_close(saved(pictures), other(pictures))
        torch.nn.init.normal_(other[0].bias)
    plain[0].weight = plain[1].weight
    assert [name for name, _ in saved_parameters(plain)] == ["0.weight", "0.bias", "1.bias"]


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "model.json", "state.json"]
)
def test_a_damaged_one_named_directly_is_refused(checkpoint, name):
    data = bytearray((checkpoint / name).read_bytes())
    data[-3] ^= 1
    (checkpoint / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged; got {name} has xxh3_128 .* expected"):
        load_trained(checkpoint)
    with pytest.raises(UserError, match="holds no model"):
        load_trained(checkpoint.parent.parent)


def test_a_file_that_the_manifest_does_not_list_is_not_read(checkpoint):
    """It would have the last word on a parameter, and nothing vouches for it."""
    whole = checkpoint / "rank-00000-of-00002.safetensors"
    shutil.copy(whole, checkpoint / "rank-00002-of-00002.safetensors")
    assert load_trained(checkpoint) is not None


# ---- right hashes, bad content --------------------------------------------------------------------------------------


def _listed(change):
    def craft(folder):
        path = folder / committed.MANIFEST
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(change(manifest)))

    return craft


def _text(name, text):
    def craft(folder):
        (folder / name).write_text(text)
        checkpoints.sign(folder)

    return craft


def _json(name, change):
    def craft(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        _text(name, json.dumps(value))(folder)

    return craft


def _rank(change, name="rank-00001-of-00002.safetensors"):
    def craft(folder):
        with safe_open(folder / name, "pt") as file:
            index = json.loads(file.metadata()["fragments"])
        tensors = load_file(folder / name)
        index = change(tensors, index) or index
        save_file(tensors, folder / name, metadata={"fragments": json.dumps(index)})
        checkpoints.sign(folder)

    return craft


def _entry(**values):
    return _listed(lambda manifest: {"files": [*manifest["files"], {**manifest["files"][0], **values}]})


PROJ = "clip.visual.proj"
CRAFTED = {
    "no files": _listed(lambda _: {"files": []}),
    "no list": _listed(lambda _: {"files": {"name": "state.json"}}),
    "a list alone": _listed(lambda manifest: manifest["files"]),
    "without a rank": _listed(
        lambda manifest: {"files": [f for f in manifest["files"] if "00000-of" not in f["name"]]}
    ),
    "without weights": _listed(lambda manifest: {"files": [f for f in manifest["files"] if "rank" not in f["name"]]}),
    "without a model": _listed(lambda manifest: {"files": [f for f in manifest["files"] if f["name"] != "model.json"]}),
    "a path outside": _entry(name="../step-000000006/state.json"),
    "an absolute path": _entry(name="/etc/hostname"),
    "listed twice": _entry(),
    "bytes that are text": _entry(name="x", bytes="12"),
    "an entry that is a number": _listed(lambda manifest: {"files": [*manifest["files"], 3]}),
    "brackets": lambda folder: (folder / committed.MANIFEST).write_text("[" * 100_000),
    "without settings": _listed(lambda m: {"files": [f for f in m["files"] if f["name"] != "config.yaml"]}),
    "a name with escapes": _json("model.json", lambda value: value["spec"].update(name="a\x1b[2Jb")),
    "a name that is a list": _json("model.json", lambda value: value["spec"].update(name=["x"])),
    "not text": lambda folder: (folder / committed.MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "a number of 5,000 digits": lambda folder: (folder / committed.MANIFEST).write_text("9" * 5_000),
    "NaN": _rank(lambda tensors, _: tensors.update({f"{PROJ}|weight": tensors[f"{PROJ}|weight"] * math.nan})),
    "infinity": _rank(lambda tensors, _: tensors.update({f"{PROJ}|weight": tensors[f"{PROJ}|weight"] + math.inf})),
    "an index that is a list": _rank(lambda *_: [1]),
    "an index without shapes": _rank(lambda _, index: index | {PROJ: {"start": 0, "numel": 1}}),
    "a negative start": _rank(lambda _, index: index | {PROJ: {**index[PROJ], "start": -1}}),
    "beyond the shape": _rank(lambda _, index: index | {PROJ: {**index[PROJ], "start": 1 << 40}}),
    "an enormous shape": _rank(lambda _, index: index | {PROJ: {**index[PROJ], "shape": [1 << 40, 1 << 20]}}),
    "a gap": _rank(lambda _, index: index | {PROJ: {**index[PROJ], "start": index[PROJ]["start"] + 1, "shape": [999]}}),
    "a tensor less": _rank(lambda tensors, index: (tensors.pop(f"{PROJ}|weight"), index)[1]),
    "a shorter tensor": _rank(lambda tensors, _: tensors.update({f"{PROJ}|weight": torch.zeros(2)})),
    "a parameter less": _rank(lambda tensors, index: {k: v for k, v in index.items() if k != PROJ}),
    "no safetensors": _text("rank-00001-of-00002.safetensors", "torn"),
    "model.json: text": _text("model.json", '"ViT-B-32"'),
    "model.json: empty": _text("model.json", "{}"),
    "model.json: a list as spec": _text("model.json", '{"spec": [1]}'),
    "model.json: another field": _json("model.json", lambda value: value["spec"].update(run="code")),
    "model.json: another model": _json("model.json", lambda value: value["spec"]["model_cfg"].update(embed_dim=48)),
    "model.json: no text": _json("model.json", lambda value: value["spec"]["model_cfg"].pop("text_cfg")),
    "model.json: brackets": _text("model.json", "[" * 100_000),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_what_the_hashes_vouch_for_is_looked_at_all_the_same(checkpoint, name):
    CRAFTED[name](checkpoint)
    with pytest.raises(UserError):
        load_trained(checkpoint)


STATES = {
    "text": '"six"',
    "empty": "{}",
    "a field more": '{"version": 1, "step": 6, "run": 1}',
    "a step that is text": '{"version": 1, "step": "6"}',
    "a negative step": '{"version": 1, "step": -6}',
    "half a step": '{"version": 1, "step": 6.5}',
    "a position that is a list": '{"version": 1, "step": 6, "position": [1]}',
    "losses that are text": '{"version": 1, "step": 6, "recent_losses": ["low"]}',
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_none_is_refused(checkpoint, name):
    _text("state.json", STATES[name])(checkpoint)
    with pytest.raises(UserError):
        CheckpointReader(resolve_checkpoint(checkpoint)).state()


POSITION = {"version": 2, "manifest_digest": "x", "seed": -1, "streams": 4, "window": 8, "step": 6, "samples_seen": 48}


@pytest.mark.parametrize(
    "change",
    [
        {"sources": 3},
        {"sources": [3]},
        {"sources": [[1, "2"]]},
        {"sources": [[1, -2]]},
        {"streams": "4"},
        {"step": None},
    ],
    ids=str,
)
def test_a_position_that_is_none_is_refused(change):
    whole = POSITION | {"sources": [[1, 16]]}
    assert Position.from_dict(whole).sources == ((1, 16),)
    with pytest.raises(UserError, match="position cannot be read"):
        Position.from_dict(whole | change)


# ---- copies and other names -----------------------------------------------------------------------------------------


def _tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_the_run_named_counts_and_nothing_else_is_touched(tmp_path):
    names = (
        "step-old",
        "step-000000006.bak",
        "step-000000006 (copy)",
        "step-6",
        "step-0000000006",
        "step-",
        "step-9e9",
    )
    checkpoints.write(tmp_path, 6)
    folder = tmp_path / committed.FOLDER
    for name in (*names, "step-000000099", "step-best"):  # 99: a copy whose state says that it is of step 6
        shutil.copytree(folder / "step-000000006", folder / name)
    (folder / "step-000000007").write_text("a file")
    (folder / ".writing-notes").mkdir()
    assert newest_intact(folder) == (folder / "step-000000006", [])
    foreign = {name: _tree(folder / name) for name in (*names, "step-000000099", "step-best")}
    for step in (8, 10, 12):
        checkpoints.write(tmp_path, step)
        committed.clear(folder, folder)
        kept = Retention(keep=2, keep_every=5).superfluous(committed.committed(folder))
        assert [step_of(path) for path in kept] == {8: [], 10: [6], 12: [6, 8]}[step]
    assert newest_intact(folder)[0].name == "step-000000012"
    assert {name: _tree(folder / name) for name in foreign} == foreign
    assert (folder / ".writing-notes").is_dir()
    assert load_trained(folder / "step-000000006.bak") is not None  # named directly, it is as good as any


def test_steps_are_counted_as_numbers(tmp_path):
    for step in (999_999_999, 1_000_000_000):
        checkpoints.write(tmp_path, step)
    assert [step_of(path) for path in committed.committed(tmp_path / committed.FOLDER)] == [999_999_999, 1_000_000_000]
    assert step_of(newest_intact(tmp_path / committed.FOLDER)[0]) == 1_000_000_000


@pytest.mark.parametrize("name", ["", "step-000000099", "\0", "../checkpoints", "x" * 10_000])
def test_a_pointer_to_no_checkpoint_is_said(tmp_path, name):
    checkpoints.write(tmp_path, 6)
    (tmp_path / committed.FOLDER / committed.LATEST).write_text(name)
    with pytest.raises(UserError, match="latest names no checkpoint; got"):
        load_trained(tmp_path / committed.FOLDER / committed.LATEST)
    assert load_trained(tmp_path) is not None
    with pytest.raises(UserError, match="is missing"):
        load_trained("x" * 5_000)
