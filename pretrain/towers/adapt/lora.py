"""LoRA (arXiv 2106.09685) by peft: beside the linear layers of a tower's blocks stand matrices of a low rank, which
learn in their place. Such a layer computes W x + alpha / rank * B A x; A starts at random, B at 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.adapt import LoraConfig
from pretrain.towers.adapt.adapter import Adapter, Tensors
from pretrain.towers.adapt.split_attention import SplitAttention, keep_names, splits
from pretrain.towers.parts import in_block, tower_of, towers_of

_A, _B = ".lora_A.weight", ".lora_B.weight"  # how names in the state dict end
_NATIVE = {
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
}
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


class Lora(Adapter):
    """Low-rank matrices, drawn from `seed`, in the towers that the settings name; these towers' own weights stop
    learning."""

    def __init__(self, settings: LoraConfig, seed: int = 0):
        self.settings, self.seed = settings, seed
        self.scale = settings.alpha / settings.rank

    def apply(self, model: nn.Module) -> None:
        """Raises UserError where a tower has no layers of the kind that the settings name, or has them in an attention
        of its own."""
        import peft  # late: it takes seconds
        from peft.tuners.lora import Linear

        clip = towers_of(model).clip
        learning = {id(parameter) for parameter in clip.parameters() if parameter.requires_grad}
        layers = self._layers(clip)
        config = peft.LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,  # type: ignore[arg-type]  # peft divides it
            target_modules="|".join(map(re.escape, layers)),  # of whole names: of a list each would match an end too
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            peft.inject_adapter_in_model(config, clip)
        for layer in (module for module in clip.modules() if isinstance(module, Linear)):
            layer.cast_input_dtype_enabled = False  # autocast does that
            keep_names(layer, _NATIVE)
        for name, parameter in clip.named_parameters():
            kept = id(parameter) in learning and tower_of(f"clip.{name}") not in self.settings.parts
            parameter.requires_grad_(".lora_" in name or kept)

    def added(self, name: str) -> bool:
        """Its matrices end so in the state dict."""
        return name.endswith((_A, _B))

    def merged(self, state: Tensors) -> Tensors:
        """W + alpha / rank * B A, in fp64 until the end."""
        plain = {name: value for name, value in state.items() if not self.added(name)}
        for name in (name.removesuffix(_A) for name in state if name.endswith(_A)):
            key = f"{name}.weight" if f"{name}.weight" in plain else f"{name}_weight"  # of an attention's in_proj
            down, up, weight = state[name + _A], state.get(name + _B), plain.get(key)
            if up is None or weight is None or not _fit(down, up, weight, self.settings.rank):
                raise UserError(
                    f"what LoRA added to {name} does not go with its weights",
                    got=", ".join("none" if value is None else str(tuple(value.shape)) for value in (down, up, weight)),
                    expected=f"matrices of rank {self.settings.rank} and a weight as large as their product",
                )
            plain[key] = (weight.double() + self.scale * (up.double() @ down.double())).to(weight.dtype)
        return plain

    def _layers(self, clip: nn.Module) -> list[str]:
        """The names of the linear layers to add to. Attentions are taken apart first."""
        if self.settings.targets != "mlp":
            for name, attention in self._inside(clip):
                if splits(attention):
                    clip.set_submodule(name, SplitAttention(attention))
        found = []
        for name, module in self._inside(clip):
            if self.settings.targets not in ("all", "attention" if _ATTENTION.search(name) else "mlp"):
                continue
            if getattr(module, "in_proj_weight", None) is not None:
                _refuse(name, type(module).__name__, "an attention whose projections are linear layers")
            if isinstance(module, nn.Linear):
                found.append(name)
        for part in self.settings.parts:
            if part not in {tower_of(f"clip.{name}.weight") for name in found}:
                _refuse(f"the {part} tower", "none", "linear layers in its blocks")
        return found

    def _inside(self, clip: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Modules of the blocks of the towers, by name."""
        for name, module in list(clip.named_modules()):
            of_clip = f"clip.{name}.weight"
            if tower_of(of_clip) in self.settings.parts and in_block(of_clip):
                yield name, module


def _fit(down: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
    return down.dim() == up.dim() == 2 and (len(up), down.shape[1]) == weight.shape and len(down) == up.shape[1] == rank


def _refuse(where: str, got: str, expected: str) -> None:
    raise UserError(
        f"LoRA finds no place in {where}",
        got=got,
        expected=expected,
        remedy="set targets or parts of the adapter to what the tower has (targets: mlp), or train it whole",
    )
