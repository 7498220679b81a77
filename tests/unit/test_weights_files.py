"""Files that are called weights: what holds none, is damaged or wants to run is told in one line."""

import zipfile

import pytest
import torch
from safetensors.torch import save_file

import tiny
from data_tools.errors import UserError
from model_files import architecture_with, config_with, weights
from pretrain.engine.opening import open_model
from pretrain.tasks.contrastive import load_init


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """The JSON of the tiny towers."""
    return architecture_with(tmp_path_factory.mktemp("architecture") / "tiny.json")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


NO_WEIGHTS = {
    "a list": [1, 2],
    "a tensor": torch.zeros(3),
    "a number": 7,
    "nothing": {},
    "an empty state": {"state_dict": {}},
    "integers": {"a": 1, "b": 2},
    "integers as names": {1: torch.zeros(2)},
    "text": {"visual.proj": "abc"},
    "a list inside": {"state_dict": [torch.zeros(2)]},
    "a sparse tensor": {"visual.proj": torch.zeros(3, 3).to_sparse()},
    "a complex tensor": {"visual.proj": torch.zeros(3, 3, dtype=torch.complex64)},
    "other tensors": {"weight": torch.zeros(3)},
    "scalars": {"positional_embedding": torch.tensor(1.0), "visual.positional_embedding": torch.tensor(2.0)},
    "odd positions": {"positional_embedding": torch.zeros(3, 5), "visual.positional_embedding": torch.zeros(4, 32)},
    "none": {"visual.proj": None},
    "a wide view of one number": {"visual.proj": torch.zeros(1).expand(1 << 40, 1 << 20)},
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_holds_no_weights_is_one_line(tmp_path, architecture, name):
    for suffix in (".pt", ".bin"):
        torch.save(NO_WEIGHTS[name], tmp_path / f"x{suffix}")
        config = config_with(str(tmp_path / f"x{suffix}"), architecture)
        with pytest.raises(UserError):
            open_model(tmp_path / f"x{suffix}", architecture=architecture)
        with pytest.raises(UserError):
            load_init(tiny.build(), config)


def test_damaged_and_dangerous_files_are_one_line(tmp_path, architecture):
    def script(path):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))

    def compressed(path):
        torch.save(weights(tiny.build()), path)
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in members.items():
                new.writestr(name, content)

    def cut(path):
        torch.save(weights(tiny.build()), path)
        path.write_bytes(path.read_bytes()[:-1000])

    for name, write, words in (
        ("a.pt", script, "a TorchScript archive"),
        ("b.pt", compressed, "is compressed"),
        ("c.pt", cut, "cannot be read"),
        ("d.pt", lambda path: torch.save({"state_dict": Runs(str(tmp_path / "ran"))}, path), "asks for"),
        ("e.pt", lambda path: path.write_bytes(b""), "cannot be read"),
        ("f.pt", lambda path: path.write_text("<html>"), "cannot be read"),
        ("g.safetensors", lambda path: path.write_bytes(b"\xff" * 64), "cannot be read"),
        ("h.safetensors", lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), "cannot be read"),
    ):
        write(tmp_path / name)
        with pytest.raises(UserError, match=words):
            open_model(tmp_path / name, architecture=architecture)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, architecture, value):
    state = weights(tiny.build())
    state["visual.proj"][0, 0] = value
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"not finite; got NaN or infinity in visual\.proj"):
        open_model(tmp_path / "weights.safetensors", architecture=architecture)


ODD = {
    "fp8": (lambda state: {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}, "Float|float8"),
    "int8": (lambda state: {key: value.to(torch.int8) for key, value in state.items()}, "int8"),
    "one int8": (lambda state: {"visual.proj": state["visual.proj"].to(torch.int8)}, "visual.proj: torch.int8"),
    "beyond fp32": (lambda state: {"visual.proj": state["visual.proj"].double() * 1e300}, "not finite"),
    "two scales": (lambda _: {"logit_scale": torch.ones(2)}, "other shape logit_scale"),
    "no patches": (lambda _: {"visual.positional_embedding": torch.zeros(1, 32)}, "other shape visual.positional_emb"),
    "one name twice": (
        lambda state: {"module.visual.proj": torch.ones_like(state["visual.proj"])},
        "two tensors of one",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_tensors_that_no_tower_computes_with_are_refused(tmp_path, architecture, name):
    change, words = ODD[name]
    state = weights(tiny.build())
    save_file(state | change(state), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=words):
        open_model(tmp_path / "weights.safetensors", architecture=architecture)


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "module.module."])
def test_wrappers_in_each_other_are_taken_off(tmp_path, architecture, prefix):
    state = weights(tiny.build())
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "weights.safetensors")
    opened = open_model(tmp_path / "weights.safetensors", architecture=architecture)[0].export_state()
    assert all(torch.equal(opened[key], state[key]) for key in state)
