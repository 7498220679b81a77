"""What a model can learn by: the settings of each objective, and where it stands. No torch.

An objective is a file, and an entry in OBJECTIVES. It has the settings that it heeds, and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


@dataclass(frozen=True)
class FeatureDistillationConfig(ObjectiveConfig):
    """CLIP-KD's (arXiv 2307.12732): the mean squared error between unit-norm features, brought to the teacher's size by
    a linear map, and those that a teacher gave the sample."""

    type: str = choice("feature_distillation")
    fields: tuple[str, str] = ("image", "teacher_image")  # what learns, and the stored field of its teacher

    def needs(self) -> tuple[Mapping[str, Need], Mapping[str, Need]]:
        """The teacher's features, and a head of their size."""
        return _projections([self.fields]), _stored(self.fields[1:])

    def check(self) -> Iterator[Fault]:
        """The teacher is not a tower."""
        if self.fields[1] in _TOWERS:
            yield Fault("fields", "what learns and a stored field, in this order", "fields: [image, teacher_image]")


@dataclass(frozen=True)
class TaughtPairsConfig(ScaledConfig):
    """A loss over the pairs that two fields make in the global batch, and over those of their teachers."""

    fields: tuple[str, str] = ("image", "text")  # what learns
    teachers: tuple[str, str] = ("teacher_image", "teacher_text")  # the stored fields of their teachers, of one size

    def needs(self) -> tuple[Mapping[str, Need], Mapping[str, Need]]:
        """The teachers' features."""
        return {}, _stored(self.teachers)

    def check(self) -> Iterator[Fault]:
        """Nothing is compared with itself, and the teachers are not towers."""
        if self.fields[0] == self.fields[1]:
            yield Fault("fields", "two different fields")
        if _TOWERS & set(self.teachers):
            yield Fault("teachers", "two stored fields", "teachers: [teacher_image, teacher_text]")

    def check_widths(self, widths: Mapping[str, int | None]) -> Iterator[Fault]:
        """The teachers' features are compared with each other, or with those that are brought to the other's size."""
        first, second = (widths[name] for name in self.teachers)
        if first != second:
            yield Fault("teachers", f"two fields of one size, and these have {first} and {second}")


@dataclass(frozen=True)
class RelationalDistillationConfig(TaughtPairsConfig):
    """CLIP-KD's contrastive relational distillation: similarities are spread over the global batch as the teacher's
    are."""

    type: str = choice("relational_distillation")
    teacher_temperature: float = number(0.01, ge=0.001, le=10)  # what the teacher's similarities are divided by


@dataclass(frozen=True)
class InteractiveContrastiveConfig(TaughtPairsConfig):
    """CLIP-KD's interactive contrastive learning: an image tells the teacher's feature of its text from those of all
    others, and a text that of its image."""

    type: str = choice("interactive_contrastive")

    def needs(self) -> tuple[Mapping[str, Need], Mapping[str, Need]]:
        """The teachers' features, and for each that learns a head of the size of its own teacher's."""
        return _projections(zip(self.fields, self.teachers, strict=True)), _stored(self.teachers)


_TOWERS = {"image", "text"}


def projection_of(field: str, teacher: str) -> str:
    """The head that brings a field's rows to the size of its teacher's."""
    return f"{field}_to_{teacher}"


def _projections(pairs: Iterable[tuple[str, str]]) -> dict[str, Need]:
    return {projection_of(of, to): {"type": "projection", "of": of, "to": to} for of, to in pairs}


def _stored(teachers: Iterable[str]) -> dict[str, Need]:
    return dict.fromkeys(teachers, "embedding")


def at_odds(objectives: Mapping[str, ObjectiveConfig]) -> Iterator[Fault]:
    """What objectives that share one scale or bias want of it differently, and a name that is taken."""
    if "loss" in objectives:
        yield Fault("objectives", "names other than loss, under which the sum is logged")
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


OBJECTIVES: dict[str, Entry[ObjectiveConfig]] = {
    "infonce": Entry(InfoNCEConfig, "pretrain.objectives.infonce:InfoNCE"),
    "multi_positive": Entry(MultiPositiveConfig, "pretrain.objectives.multi_positive:MultiPositive"),
    "sigmoid": Entry(SigmoidConfig, "pretrain.objectives.sigmoid:Sigmoid"),
    "margin": Entry(MarginConfig, "pretrain.objectives.margin:Margin"),
    "mlm": Entry(MLMConfig, "pretrain.objectives.mlm:MLM"),
    "classes": Entry(ClassesConfig, "pretrain.objectives.classes:Classes"),
    "match": Entry(MatchConfig, "pretrain.objectives.match:Match"),
    "feature_distillation": Entry(FeatureDistillationConfig, "pretrain.objectives.distill:FeatureDistillation"),
    "relational_distillation": Entry(
        RelationalDistillationConfig, "pretrain.objectives.distill:RelationalDistillation"
    ),
    "interactive_contrastive": Entry(
        InteractiveContrastiveConfig, "pretrain.objectives.distill:InteractiveContrastive"
    ),
}
OF_TOWERS = {name: entry for name, entry in OBJECTIVES.items() if entry.settings is not ClassesConfig}
OF_PAIRS = {name: entry for name, entry in OBJECTIVES.items() if issubclass(entry.settings, PairsConfig)}
