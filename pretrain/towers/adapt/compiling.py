"""torch.compile by tower, in training: pictures have one shape, texts a few, and every shape has its own graph."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass, replace

import torch
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.clip import Clip
from pretrain.towers.cut import LENGTHS, TextRule
from pretrain.towers.parts import towers_of
from pretrain.towers.text import text_forward

_COMPILERS = ("g++", "clang++", "gcc", "clang")  # of the C++ that Inductor writes for CPUs, of Triton's C for GPUs
_GRAPHS = 64  # of a tower: lengths of texts, one or two sizes of buckets, with and without gradients


class CompiledTowers:
    """`image` and `text` as the plain towers' forwards are called. Random numbers are those of the plain towers.

    Raises:
        UserError: this machine has no compiler.
    """

    def __init__(self, clip: Clip, rule: TextRule):
        if not os.environ.get("CXX") and not any(map(shutil.which, _COMPILERS)):
            raise UserError(
                "train.compile needs a compiler on every host",
                got="none of " + ", ".join(_COMPILERS),
                remedy="install one, or set train.compile=false",
            )
        torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
        compiled = functools.partial(torch.compile, dynamic=False, options={"fallback_random": True})
        self.image = compiled(clip.encode_image)
        self.text = compiled(functools.partial(text_forward, clip, rule))


@dataclass(frozen=True)
class Compile(Adapter):
    """Runs the towers through torch.compile in training; evaluation, whose batches have other shapes, stays plain."""

    def apply(self, model: nn.Module) -> None:
        """From then on texts are cut to few lengths. Raises UserError where this machine has no compiler."""
        towers = towers_of(model)
        towers.rule = replace(towers.rule, multiple=LENGTHS)
        towers.compiled = CompiledTowers(towers.clip, towers.rule)
