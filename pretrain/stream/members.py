"""How training reads a stored sample: the mapping of `data_tools.media.members`, and which of several captions a step
sees."""

from dataclasses import dataclass

from data_tools.corpus import Sample
from data_tools.errors import UsageError
from data_tools.media import members
from pretrain.stream.draw import Draw, Purpose

CHOICES = ("random", "first")


@dataclass(frozen=True)
class Fields(members.Fields):
    """The key mapping of a training source.

    Args:
        choose: which of several captions a training step sees: `random`, by a hash of (seed, epoch, sample id), or
            `first`.
    """

    choose: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choose not in CHOICES:
            raise UsageError("unknown rule to choose a caption", got=self.choose, expected=" or ".join(CHOICES))

    def training_caption(self, sample: Sample, draw: Draw) -> str:
        """The caption of this epoch. Raises BadSampleError as `all_captions` does."""
        captions = self.all_captions(sample)
        if self.choose == "first":
            return captions[0]
        return captions[draw.bits(Purpose.CAPTION) % len(captions)]


PLAIN = Fields()
