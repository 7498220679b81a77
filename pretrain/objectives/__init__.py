"""What a model can learn by: the settings of each objective, and where it stands. No torch.

An objective is a file, and an entry in OBJECTIVES. It has the settings that it heeds, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pretrain.config.declare import Fault, Section, choice, number
from pretrain.config.registry import Entry

Need = str | Mapping[str, Any]  # a type in HEADS or FIELDS, or its settings, `type` among them, where the user has none


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """What is minimised, each under a name: `objectives: {infonce: {label_smoothing: 0.1}}`. A name alone, or a list of
    names, takes their defaults: `objectives=sigmoid`."""

    type: str = "???"  # which objective; may be left out where the name says it
    weight: float = number(1.0, gt=0, le=1e6)  # its factor in the sum that is minimised

    heads: ClassVar[Mapping[str, Need]] = {}
    extra_fields: ClassVar[Mapping[str, Need]] = {}

    def needs(self) -> tuple[Mapping[str, Need], Mapping[str, Need]]:
        """By name, the heads that it reads and the fields beside images, texts and labels: see `Need`."""
        return self.heads, self.extra_fields

    def check_widths(self, widths: Mapping[str, int | None]) -> Iterator[Fault]:
        """The faults that show beside the numbers that a row of each further field has; None: that is not stored."""
        yield from ()


@dataclass(frozen=True)
class ScaledConfig(ObjectiveConfig):
    """An objective that scales similarities by a temperature, which the model learns."""

    # 1 / logit_scale at the start; null: model.init's, else 0.07 (sigmoid: 0.1).
    temperature: float | None = number(None, ge=0.01, le=1, remedy="the logit scale stays below 100")
    learn_temperature: bool = True  # whether the temperature is trained


@dataclass(frozen=True)
class PairsConfig(ObjectiveConfig):
    """A loss over the pairs that two fields make in the global batch."""

    fields: tuple[str, str] = ("image", "text")  # what is compared with what

    def check(self) -> Iterator[Fault]:
        """Nothing is compared with itself."""
        if self.fields[0] == self.fields[1]:
            yield Fault("fields", "two different fields")


@dataclass(frozen=True)
class ScaledPairsConfig(ScaledConfig, PairsConfig):
    """A loss over pairs that scales their similarities."""


@dataclass(frozen=True)
class InfoNCEConfig(ScaledPairsConfig):
    """CLIP's (arXiv 2103.00020): a pair is told apart from all others of the global batch."""

    type: str = choice("infonce")
    label_smoothing: float = number(0.0, ge=0, lt=1)  # share of the target that is spread over the batch


@dataclass(frozen=True)
class MultiPositiveConfig(InfoNCEConfig):
    """InfoNCE in which pairs that share an image or a text, by hash, are no negatives."""

    type: str = choice("multi_positive")


@dataclass(frozen=True)
class SigmoidConfig(ScaledPairsConfig):
    """SigLIP's (arXiv 2303.15343): of every image and text whether they are a pair."""

    type: str = choice("sigmoid")
    # Added to scaled similarities at the start; null: model.init's, else -ln(global batch).
    logit_bias: float | None = number(None, ge=-100, le=0, remedy="null: -ln(global batch)")


@dataclass(frozen=True)
class MarginConfig(PairsConfig):
    """VSE++'s (arXiv 1707.05612): the cosine of a pair exceeds those of its negatives."""

    type: str = choice("margin")
    margin: float = number(0.2, gt=0, le=2, remedy="cosines lie between -1 and 1")  # by how much
    negatives: str = choice("sum", "hardest")  # of all negatives | the hardest of each image and of each text


@dataclass(frozen=True)
class ClassesConfig(ObjectiveConfig):
    """Cross-entropy of a classifier's scores."""

    type: str = choice("classes")


@dataclass(frozen=True)
class MatchConfig(ObjectiveConfig):
    """ALBEF's image-text matching (arXiv 2107.07651): a head that sees both tells pairs from hard negatives."""

    type: str = choice("match")
    # A wrong text for each image and a wrong image for each text: drawn by softmax of similarity | the most similar.
    negatives: str = choice("sampled", "hardest")
    mining_temperature: float = number(0.07, ge=0.01, le=100)  # of that softmax; the higher the easier they are

    heads = {"fusion": "fusion"}  # noqa: RUF012


@dataclass(frozen=True)
class MLMConfig(ObjectiveConfig):
    """Masked words (BERT, arXiv 1810.04805): what stood where a second look at the text hides some of its words. The
    mean is over the hidden words of the global batch, however many a rank has."""

    type: str = choice("mlm")

    heads: ClassVar[Mapping[str, Need]] = {"words": "words"}
    extra_fields: ClassVar[Mapping[str, Need]] = {"masked_text": "masked_text"}


def at_odds(objectives: Mapping[str, ObjectiveConfig]) -> Iterator[Fault]:
    """What objectives that share one scale or bias want of it differently."""
    for name in ("temperature", "learn_temperature", "logit_bias"):
        asked = {of: getattr(one, name) for of, one in objectives.items() if getattr(one, name, None) is not None}
        for of, value in asked.items():
            first = next(iter(asked))
            if value != asked[first]:
                rule = f"{asked[first]}, as objectives.{first} has it: there is one in the model"
                yield Fault(f"objectives.{of}.{name}", rule, "set it in one place")


def of_features(objectives: Mapping[str, ObjectiveConfig]) -> dict[str, ObjectiveConfig]:
    """Those that are over pairs of an image and a text, and so have a value for the features of a corpus."""
    pairs = {name: one for name, one in objectives.items() if isinstance(one, PairsConfig)}
    return {name: one for name, one in pairs.items() if set(one.fields) == {"image", "text"}}


OBJECTIVES = {
    "infonce": Entry(InfoNCEConfig, "pretrain.objectives.infonce:InfoNCE"),
    "multi_positive": Entry(MultiPositiveConfig, "pretrain.objectives.multi_positive:MultiPositive"),
    "sigmoid": Entry(SigmoidConfig, "pretrain.objectives.sigmoid:Sigmoid"),
    "margin": Entry(MarginConfig, "pretrain.objectives.margin:Margin"),
    "mlm": Entry(MLMConfig, "pretrain.objectives.mlm:MLM"),
    "classes": Entry(ClassesConfig, "pretrain.objectives.classes:Classes"),
    "match": Entry(MatchConfig, "pretrain.objectives.match:Match"),
}
OF_TOWERS = {name: entry for name, entry in OBJECTIVES.items() if entry.settings is not ClassesConfig}
OF_PAIRS = {name: entry for name, entry in OBJECTIVES.items() if issubclass(entry.settings, PairsConfig)}
