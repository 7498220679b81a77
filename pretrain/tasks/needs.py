"""What the objectives of a run need beside images, texts and labels, joined with what the user sets of it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pretrain.config.declare import Fault
from pretrain.config.registry import Entry
from pretrain.objectives import Need, ObjectiveConfig
from pretrain.stream.fields import FIELDS, FieldConfig
from pretrain.towers.heads import HEADS, HeadConfig

if TYPE_CHECKING:
    from pretrain.towers.heads.equip import Equipment


@dataclass(frozen=True)
class Needs:
    """Settings of heads and of further fields, by name."""

    heads: Mapping[str, HeadConfig]
    fields: Mapping[str, FieldConfig]


def needs_of(
    objectives: Mapping[str, ObjectiveConfig], heads: Mapping[str, HeadConfig], fields: Mapping[str, FieldConfig]
) -> Needs:
    """What `objectives` need; of that `heads` and `fields` are what the user has set."""
    asked = [one.needs() for one in objectives.values()]
    return Needs(
        {name: heads.get(name) or _made(HEADS, need) for needed, _ in asked for name, need in needed.items()},
        {name: fields.get(name) or _made(FIELDS, need) for _, needed in asked for name, need in needed.items()},
    )


def equipment_of(needs: Needs) -> Equipment:
    """What a dual encoder has beside its towers for objectives with these needs."""
    from pretrain.towers.heads.equip import Equipment  # late: it imports torch

    encoder_of = {name: one.ENCODER for name, one in needs.fields.items() if one.ENCODER is not None}
    sizes = {name: one.width for name, one in needs.fields.items() if one.width is not None}
    return Equipment(encoder_of, sizes, needs.heads)


def faults(
    objectives: Mapping[str, ObjectiveConfig], heads: Mapping[str, HeadConfig], fields: Mapping[str, FieldConfig]
) -> Iterator[Fault]:
    """What of the user's `heads` and `fields` no objective reads, or is of another type than it reads; what an
    objective reads that needs settings and has none; and fields that do not go together."""
    asked = [one.needs() for one in objectives.values()]
    for place, given, registry, which in (("heads", heads, HEADS, 0), ("fields", fields, FIELDS, 1)):
        wanted: dict[str, Need] = {}
        for name, need in (pair for needed in asked for pair in needed[which].items()):
            if _spelt(wanted.setdefault(name, need)) != _spelt(need):
                rule = f"objectives that need one {place}.{name}, and these need {wanted[name]} and {need}"
                yield Fault("objectives", rule)
        for name, own in given.items():
            if name not in wanted:
                rule = f"those that the objectives read: {', '.join(wanted) or 'none'}"
                yield Fault(place, rule, f"leave {name} out")
            elif own.type != _type(wanted[name]):
                yield Fault(f"{place}.{name}.type", _type(wanted[name]))
            elif place == "heads":  # of a field the needed settings are defaults
                yield from _unlike(f"{place}.{name}", own, _spelt(wanted[name]))
        for name in (name for name in wanted if name not in given):
            for fault in _made(registry, wanted[name]).check():
                remedy = f"{place}.{name}='{{type: {_type(wanted[name])}, {fault.field}: ...}}'"
                yield Fault(place, f"settings of {name} with {fault.field}: {fault.rule}", remedy)
    widths = {name: own.width for name, own in needs_of(objectives, heads, fields).fields.items()}
    for name, one in objectives.items():
        yield from (replace(fault, field=f"objectives.{name}.{fault.field}") for fault in one.check_widths(widths))


def _unlike(place: str, own: HeadConfig | FieldConfig, need: Mapping[str, Any]) -> Iterator[Fault]:
    """Where a head is set to be of other fields than an objective reads it for."""
    whole = ", ".join(f"{key}: {value}" for key, value in need.items())
    for key, value in need.items():
        if getattr(own, key) != value:
            yield Fault(f"{place}.{key}", f"{value}, as the objective needs it", f"{place}='{{{whole}}}'")


def _spelt(need: Need) -> Mapping[str, Any]:
    return {"type": need} if isinstance(need, str) else need


def _type(need: Need) -> str:
    return _spelt(need)["type"]


def _made(registry: Mapping[str, Entry], need: Need) -> Any:
    return registry[_type(need)].settings(**_spelt(need))
