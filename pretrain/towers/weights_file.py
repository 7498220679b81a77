"""Reading files of weights, whoever wrote them: tensors come out, or one line that says why not. Nothing is run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_tools.errors import UserError
from pretrain.towers.files import SUFFIXES, few
from pretrain.towers.fit import free_bytes

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # where trainers keep the weights among other things
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile, in any order
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers among OpenAI's tensors
_GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, by key: safetensors, or what torch.save wrote, of which tensors and plain values
    are unpickled alone.

    Raises:
        UserError: no such file, one that cannot be read, or one that holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"weights file {path} is {'no file' if path.exists() else 'missing'}",
            expected=f"a file that ends in {', '.join(SUFFIXES)}",
        )
    if path.suffix == ".safetensors":
        try:
            state: object = load_file(path)
        except Exception as error:  # the library's faults share no class
            raise UserError(f"weights file {path} cannot be read", got=error) from None
    else:
        state = _unwrapped(_unpickled(path))
    return _named_tensors(state, path)


def activation_of(path: Path) -> str | None:
    """`gelu` or `quick_gelu` where a safetensors file says which activation its weights were trained with."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("activation")
    return said if said in ("gelu", "quick_gelu") else None


def refuse_quantised(state: Mapping[str, torch.Tensor], source: object) -> None:
    """Raises UserError naming the tensors of `state` that are integers or fp8: of parameters they are numbers that mean
    something only together with scales, and would load as they are."""
    odd = [key for key, value in state.items() if not value.is_floating_point() or value.itemsize < 2]
    if odd:
        raise UserError(
            f"the weights of {source} are no floating-point numbers of 16 bits or more",
            got=f"{few(odd)}: {', '.join(sorted({str(state[key].dtype) for key in odd}))}",
            remedy="give the weights from before they were quantised",
        )


def refuse_non_finite(state: Mapping[str, torch.Tensor], source: object) -> None:
    """Raises UserError naming the tensors of `state` with a NaN or an infinity once they are fp32: nothing can be
    computed with them."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if bad:
        raise UserError(
            f"the weights of {source} are not finite",
            got=f"NaN or infinity in {few(bad)}",
            remedy="give weights from before the training diverged, or restore a copy of the file",
        )


def _unpickled(path: Path) -> object:
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path)
        elif (size := path.stat().st_size) > (free := free_bytes() or size):
            raise UserError(f"weights file {path} is larger than the free memory", got=size, expected=f"<= {free}")
        # An archive is mapped: tensors of other shapes than the model's are refused before they are read.
        with warnings.catch_warnings(action="ignore"):  # of tensors that are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wanted = _GLOBAL.search(str(error))
        raise UserError(
            f"weights file {path} cannot be read",
            got=f"a pickle that asks for {wanted[1]}" if wanted else "no pickle of tensors",
            expected="tensors and plain values alone, for nothing in a file is run",
            remedy="save the model's state_dict, best as .safetensors",
        ) from None
    except Exception as error:  # damaged archives raise whatever they lead to
        raise UserError(f"weights file {path} cannot be read", got=f"{type(error).__name__}: {error}") from None


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UserError(
            f"weights file {path} is a TorchScript archive, which is a program",
            expected="a state_dict",
            remedy="let open_clip load it, and save the model's state_dict",
        )
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:  # torch.save never compresses; a few bytes could unpack to all memory
        raise UserError(f"weights file {path} is compressed, which torch.save never does", got=few(packed))


def _unwrapped(state: object) -> object:
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            return state[name]
    return state


def _named_tensors(state: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(state, Mapping):
        raise UserError(f"weights file {path} holds no tensors by name", got=f"a {type(state).__name__}")
    tensors = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise UserError(f"weights file {path} holds no tensors by name", got=f"the name {key!r}")
        if not isinstance(value, torch.Tensor):
            got = f"{key}, a {type(value).__name__}"
            raise UserError(f"weights file {path} holds more than tensors", got=got, remedy="save the state_dict alone")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            got = f"{key}: {value.dtype}, {value.layout}, on {value.device}"
            raise UserError(f"weights file {path} holds tensors of a kind that no tower has", got=got)
        key = _PREFIXES.sub("", key)
        if key in tensors:
            raise UserError(f"weights file {path} holds two tensors of one name", got=key)
        if key not in _NO_WEIGHTS:
            tensors[key] = value
    if not tensors:
        raise UserError(f"weights file {path} holds no tensors")
    return tensors
