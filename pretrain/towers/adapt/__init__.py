"""What is done to a model before it trains, and the settings that ask for it. No torch.

What is added to the towers (low-rank matrices beside theirs) is a file, and an entry in ADAPTERS, which the settings
name in their map `adapters`. The rest has settings elsewhere in the tree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pretrain.config.declare import Fault, PartNames, Section, choice, number, setting, unknown_parts
from pretrain.config.registry import Entry, entries
from pretrain.config.tree import Config, Phase


@dataclass(frozen=True)
class AdapterConfig(Section):
    """What is added to towers, each under a name: `adapters: {lora: {rank: 8}}`. A name alone takes its defaults:
    `adapters=lora`. Exports and the next run get towers that it is merged into."""

    type: str = "???"  # what is added; may be left out where the name says it
    # Towers (image, text) that it is added to; empty: all that are not locked.
    parts: list[str] = setting([], PartNames())


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): the towers' own weights stay as they are, matrices of a low rank beside them learn."""

    type: str = choice("lora")
    rank: int = number(8, ge=1, le=4096)  # of the matrices
    alpha: float = number(16.0, gt=0, le=1e6)  # times what they give, divided by the rank
    # Which layers of a tower's blocks have such matrices: all linear ones | those of the attention | of the MLP.
    targets: str = choice("all", "attention", "mlp")
    dropout: float = number(0.0, ge=0, lt=1)  # none but 0: masks differ with the number of ranks and the micro-batch

    def check(self) -> Iterator[Fault]:
        """Nothing is drawn on the ranks."""
        if self.dropout:
            rule = "0: masks drawn on each rank make gradients depend on the number of ranks and the micro-batch"
            yield Fault("dropout", rule, "a lower rank or a higher optim.weight_decay regularises too")


ADAPTERS = {  # in the order in which they are applied
    "lora": Entry(LoraConfig, "pretrain.towers.adapt.lora:Lora"),
}


@dataclass(frozen=True)
class AdaptedConfig(Config):
    """The settings of a training whose model is adapted before it (`order.adapters_of`)."""

    adapters: dict[str, AdapterConfig] = entries(ADAPTERS)  # what is added to the towers, each type once

    @property
    def locked(self) -> Collection[str]:
        """Parts of the model that keep their weights."""
        return ()

    @property
    def phases(self) -> Sequence[Phase]:
        """Cheaper beginnings of the run."""
        return ()

    def added(self) -> dict[str, AdapterConfig]:
        """`adapters` with the towers that each is added to."""
        free = [part for part in self.TOWERS if part not in self.locked]
        return {name: one if one.parts else replace(one, parts=free) for name, one in self.adapters.items()}

    def check(self) -> Iterator[Fault]:
        """Each is added once, and to what learns."""
        yield from super().check()
        types = [one.type for one in self.adapters.values()]
        for place, (name, one) in enumerate(self.added().items()):
            yield from unknown_parts(f"adapters.{name}.parts", one.parts, self.TOWERS)
            if one.type in types[:place]:
                yield Fault(f"adapters.{name}.type", "each type once", "give its `parts` in one place")
            if not one.parts or set(one.parts) & set(self.locked):
                rule = f"towers that learn, and {', '.join(map(str, self.locked))} is locked"
                yield Fault(f"adapters.{name}.parts", rule, "leave it out of the one or the other")


def described(added: Mapping[str, AdapterConfig]) -> dict:
    """What model.json says of `added`, for `order.adapters_in`; nothing where nothing is added."""
    return {"adapters": {name: asdict(one) for name, one in added.items()}} if added else {}
