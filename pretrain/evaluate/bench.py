"""What all evaluators share: the ranks, the model's shapes, how corpora are opened and read, how a model is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from data_tools.corpus import Corpus, open_corpus
from data_tools.media.members import parse_fields
from data_tools.progress import Progress
from data_tools.remote.settings import CacheSettings
from pretrain.objectives import InfoNCEConfig, ObjectiveConfig
from pretrain.process.precision import is_bf16
from pretrain.process.runtime import Runtime
from pretrain.process.watchdog import heartbeat
from pretrain.stream.eval_reader import EvalBatch, EvalReader, eval_fields
from pretrain.stream.fields.field import Tokenize
from pretrain.towers.cut import Rows, TextRule
from pretrain.towers.model import Inputs, Outputs, to_device
from pretrain.towers.spec import ModelSpec, tokenizer_of

Forward = Callable[[Inputs, frozenset[str]], Outputs]
"""A model, an engine that runs one, or a function around either: inputs on its device, and the heads that are wanted.
It is in evaluation mode, and brings its own precision."""


@dataclass(frozen=True)
class Bench:
    """What evaluators get beside their settings.

    Args:
        spec: what is evaluated; of a fine-tuned classifier its towers, at the picture size that it was trained at.
        rule: how its texts may be cut.
        batch: images per rank and forward.
        cache: where remote shards are kept; None: in the usual place.
        classes: of a fine-tuned classifier, in the order of its scores; none of a dual encoder.
        heads: names of the heads that may be wanted of it; those of a classifier's scores apart.
        objectives: what `validation_loss` is the value of.
        bars: whether progress is shown.
    """

    runtime: Runtime
    spec: ModelSpec
    rule: TextRule
    batch: int = 64
    workers: int = 1
    cache: CacheSettings | None = None
    classes: tuple[str, ...] = ()
    heads: frozenset[str] = frozenset()
    objectives: Mapping[str, ObjectiveConfig] = field(default_factory=lambda: {"infonce": InfoNCEConfig()})
    bars: bool = False

    @cached_property
    def tokenize(self) -> Tokenize:
        """The model's tokenizer, which is not looked for before somebody has texts."""
        return tokenizer_of(self.spec)

    def corpus(self, urls: str) -> Corpus:
        """The corpus at `urls`. Raises UserError where there is none."""
        return open_corpus(urls, self.cache)

    def reader(self, corpus: Corpus, texts: bool = False, captions: str | None = None) -> EvalReader:
        """This rank's reader of images, of labels where there are some, and of `texts` at the places `captions`."""
        tokenize = self.tokenize if texts else None
        fields = eval_fields(corpus, self.spec, tokenize, parse_fields(None, captions))
        return EvalReader(corpus, fields, self.batch, self.runtime.rank, self.runtime.world_size, self.workers)

    def batches(self, reader: Iterable[EvalBatch], images: int, what: str) -> Iterator[EvalBatch]:
        """The batches of a `reader` of so many images on all ranks; rank 0 shows how far `what` is."""
        done, ranks = 0, self.runtime.world_size
        shown = what if ranks == 1 else f"{what} (rank 0 of {ranks})"
        bar = Progress(shown, -(-images // ranks), "images") if self.bars and self.runtime.is_main else None
        with bar or nullcontext():
            for batch in reader:
                yield batch
                done += len(batch.positions)
                if bar:
                    bar.update(done)

    def text_rows(self, tokens: torch.Tensor) -> Rows:
        """`tokens` `[n, context]`, sorted and cut as the model allows."""
        return self.rule(tokens.cpu())

    def run(self, forward: Forward, inputs: Inputs, want: frozenset[str] = frozenset()) -> Outputs:
        """What the model makes of inputs on the host, without gradients. Each call counts as progress of the run."""
        heartbeat()
        with torch.no_grad():
            return forward(to_device(inputs, self.runtime.device), want)


def in_precision(model: torch.nn.Module, device: torch.device, precision: str) -> Forward:
    """`model` as evaluators call it, in autocast where `precision` says so."""

    def forward(inputs: Inputs, want: frozenset[str]) -> Outputs:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(precision)):
            return model(inputs, want)

    return forward
