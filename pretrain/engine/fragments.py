"""Which piece of which tensor this rank owns, at every ZeRO stage, in one form.

DeepSpeed's own checkpoints are tied to the world size and to pickle; its universal conversion mixes parameter groups at
stage 3. A checkpoint of fragments (parameter name, start, values) is tied to nothing: any rank of any world size and
stage finds its piece in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pretrain.engine.optimizers import states_of

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine

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


def local_fragments(engine: Engine, rank: int, world_size: int) -> Iterator[Fragment]:
    """Every fragment that this rank is the one to save. Over all ranks they cover each parameter exactly once."""
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if engine.stage == 3:
            piece = _partition(parameter, engine, rank)
        elif engine.stage in (1, 2) and parameter.requires_grad:
            piece = _mapped(parameter, engine)
        else:  # whole on every rank: they take turns
            piece = (0, _whole(parameter, engine)) if index % world_size == rank else None
        if piece is not None:
            start, values = piece
            average = engine.ema and engine.ema.values.get(name)
            yield Fragment(name, shape, start, values if average is None else {**values, EMA: average})


def _whole(parameter: torch.nn.Parameter, engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.optimizer.state.get(parameter, {})
    return {"weight": parameter.detach().view(-1), **{k: v.view(-1) for k, v in _moments(state, parameter)}}


def _mapped(parameter: torch.nn.Parameter, engine: Engine) -> tuple[int, dict[str, torch.Tensor]] | None:
    """Stages 1 and 2: the slice of the parameter that lies in this rank's flat partition of its group."""
    link = parameter._hp_mapping
    if link is None:
        return None
    flat = engine.deepspeed.optimizer.single_partition_of_fp32_groups[link.param_group_index]
    place = link.get_hp_fragment_address()
    state = engine.optimizer.state.get(flat, {})
    values = {"weight": flat, **dict(_moments(state, flat))}
    return link.lp_fragment_address.start, {
        k: v.detach().narrow(0, place.start, place.numel) for k, v in values.items()
    }


def _partition(parameter: torch.nn.Parameter, engine: Engine, rank: int) -> tuple[int, dict[str, torch.Tensor]] | None:
    """Stage 3: an equal share of every parameter, the last one padded."""
    share = parameter.ds_tensor.ds_numel
    start = rank * share
    numel = min(share, parameter.ds_numel - start)
    if numel <= 0:
        return None
    if not parameter.requires_grad:
        return start, {"weight": parameter.ds_tensor.detach().view(-1)[:numel]}
    zero = engine.deepspeed.optimizer
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    values = {"weight": flat, **dict(_moments(engine.optimizer.state.get(flat, {}), flat))}
    return start, {k: v.detach().narrow(0, offset, numel) for k, v in values.items()}


def _moments(state: dict, like: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    return ((k, v) for k, v in state.items() if torch.is_tensor(v) and v.shape == like.shape and v.ndim > 0)


def create_optimizer_state(engine: Engine, step: int) -> None:
    """Give every flat partition, at stage 0 every parameter, zeroed states at `step` updates, as if it had trained;
    `local_fragments` then yields them for filling. Steps are counted by owner, as torch's Adam does on the device and
    timm's optimizers on the host, or by group, as its LAMB does."""
    name, groups = engine.optimizer_name, engine.optimizer.param_groups
    if engine.stage == 0:
        owners = [(p, states_of(name, group)) for group in groups for p in group["params"]]
    else:
        zero = engine.deepspeed.optimizer
        flats = zero.fp32_partitioned_groups_flat if engine.stage == 3 else zero.single_partition_of_fp32_groups
        owners = [(flat, states_of(name, {})) for flat in flats]
    for owner, states in owners:
        state = engine.optimizer.state[owner]
        state["step"] = torch.tensor(float(step), device=owner.device if name == "adamw" else "cpu")
        for kind in states:
            state[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format).detach()
    if name == "lamb":
        for group in groups:
            group["step"] = torch.tensor(float(step))
