"""Which piece of which tensor this rank owns, at every ZeRO stage, in one form.

DeepSpeed's own checkpoints are tied to the world size and to pickle; its universal conversion mixes parameter groups at
stage 3. A checkpoint of fragments (parameter name, start, values) is tied to nothing: any rank of any world size and
stage finds its piece in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.engine.optimizers import states_of
from pretrain.engine.zero import Place, Zero

EMA = "ema"


@dataclass
class Fragment:
    """Elements `start` .. `start + numel` of the flattened parameter `name` of `shape`, as this rank holds them.

    `values`: flat tensors by what they are: "weight" (the fp32 master), one for each state of the optimizer, and EMA.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        """Elements of this fragment."""
        return self.values["weight"].numel()


def saved_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of `module` in their order, by the names that checkpoints keep them under: the keys of its state
    dict. A module may be rebuilt around a parameter and keep that name (towers/adapt)."""
    names: dict[int, str] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        names.setdefault(id(value), key)
    return ((names[id(parameter)], parameter) for parameter in module.parameters())


def local_fragments(
    zero: Zero, rank: int, world_size: int, averages: Mapping[str, torch.Tensor] | None = None
) -> Iterator[Fragment]:
    """Every fragment that this rank is the one to save. Over all ranks they cover each parameter exactly once.
    `averages`: the moving averages that this rank keeps of them, by parameter name."""
    for index, (name, parameter) in enumerate(saved_parameters(zero.module)):
        whole = zero.is_whole(parameter)
        place = None if whole and index % world_size != rank else zero.place(parameter)  # they take turns
        if place is None:
            continue
        values = _values(place, zero.optimizer)
        if averages is not None and name in averages:
            values[EMA] = averages[name]
        yield Fragment(name, zero.shape(parameter), place.start, values)


def _values(place: Place, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The master and the optimizer's states of what lies in `place`, flat."""
    master = place.master
    moments = {
        name: value
        for name, value in optimizer.state.get(master, {}).items()
        if torch.is_tensor(value) and value.shape == master.shape and value.ndim > 0
    }
    tensors = {"weight": master, **moments}
    return {name: value.detach().view(-1).narrow(0, place.offset, place.numel) for name, value in tensors.items()}


def create_optimizer_state(zero: Zero, name: str, step: int) -> None:
    """Give every master of the optimizer `name` zeroed states at `step` updates, as if it had trained;
    `local_fragments` then yields them for filling. Steps are counted by master, as torch's Adam does on the device and
    timm's optimizers on the host, or by group, as its LAMB does."""
    for master, group in zero.masters():
        state = zero.optimizer.state[master]
        state["step"] = torch.tensor(float(step), device=master.device if name == "adamw" else "cpu")
        for kind in states_of(name, group):
            state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
    if name == "lamb":
        for group in zero.optimizer.param_groups:
            group["step"] = torch.tensor(float(step))
