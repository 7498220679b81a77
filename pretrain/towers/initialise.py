"""Starting from weights: strict, and it says what was loaded, what is missing and what was resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

from data_tools.errors import UserError
from pretrain.towers.buffers import take_tables
from pretrain.towers.build import DualEncoder
from pretrain.towers.clip import text_tower
from pretrain.towers.files import few
from pretrain.towers.weights_file import refuse_non_finite, refuse_quantised


@dataclass
class InitReport:
    """What an initialisation did, by native key; `notes`: warnings."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"initialised from {self.source}: {len(self.loaded)} tensors loaded"
        text += f", {len(self.resized)} resized ({', '.join(self.resized)})" if self.resized else ", none resized"
        text += f", missing and left as built: {few(self.missing)}" if self.missing else ", none missing"
        return "\n".join([text, *self.notes])


def initialise(
    model: DualEncoder, state: dict[str, torch.Tensor], source: str, may_miss: Sequence[str] = ()
) -> InitReport:
    """Load native `state` into `model.clip`: position embeddings are interpolated to the model's size, everything else
    must match; keys under a prefix of `may_miss` may be absent.

    Raises:
        UserError: missing, unexpected or wrongly shaped tensors, or such that are not finite or quantised, all named.
    """
    state = dict(state)
    if hasattr(model.clip, "text"):
        state = convert_to_custom_text_state_dict(state)
    take_tables(model.clip, state, source)
    whole = model.clip.state_dict()  # what was added to the towers starts as it was made
    own = {key: value for key, value in whole.items() if not any(one.added(key) for one in model.adapters)}
    before = {key: value.shape for key, value in state.items()}
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
            before[key] = own[key].shape
    _resize(model, state)
    missing = [key for key in own if key not in state]
    refused = [key for key in missing if not key.startswith(tuple(may_miss))] if may_miss else missing
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    if refused or unexpected or wrong:
        raise UserError(
            f"the weights of {source} do not fit model {model.spec.name}",
            got=f"missing {few(refused)}, unexpected {few(unexpected)}, other shape {few(wrong)}",
            remedy="set model.name to the weights' own architecture, and objectives=sigmoid for a logit_bias",
        )
    refuse_quantised({key: value for key, value in state.items() if own[key].is_floating_point()}, source)
    refuse_non_finite(state, source)
    model.clip.load_state_dict({**whole, **state}, strict=True)
    resized = [key for key in state if state[key].shape != before[key]]
    return InitReport(source, [key for key in own if key in state], resized, missing)


def _resize(model: DualEncoder, state: dict[str, torch.Tensor]) -> None:
    """Interpolate position embeddings of `state` to the model's size; those that are none stay, to be refused."""
    tower = text_tower(model.clip)
    for resize, owner in ((resize_pos_embed, model.clip.visual), (resize_text_pos_embed, tower)):
        own = getattr(owner, "positional_embedding", None)
        keys = (key for key, value in model.clip.state_dict(keep_vars=True).items() if value is own)
        given = next((state[key] for key in keys if key in state), None)
        if own is None or given is None or given.dim() != 2 or given.shape[1] != own.shape[1]:
            continue
        grid = len(given) - 1 if resize is resize_pos_embed else min(len(given), 1)
        if grid > 0 and round(grid**0.5) ** 2 == grid:
            resize(state, model.clip)
