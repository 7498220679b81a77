"""Whether towers fit their tokenizer and this machine. Where a tokenizer's end of text is not what the tower pools at,
nothing fails: texts that differ merely get one feature."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.clip import Clip, text_tower
from pretrain.towers.spec import ModelSpec, Tokenizer

_PROBE = ["a"]


class _Vocabulary(NamedTuple):
    largest: int  # token id
    end: int | None  # the token that stands first at the end of every text
    padding: int


def check_tokenizer(clip: Clip, tokenize: Tokenizer, spec: ModelSpec) -> None:
    """Raises UserError where the tokenizer of `spec` makes tokens that the text tower of `clip` cannot take, or ends
    texts with another token than the tower pools at, or pads them with another one than the tower leaves out."""
    tower, vocabulary = text_tower(clip), _vocabulary(tokenize.library)
    name = spec.model_cfg["text_cfg"].get("hf_tokenizer_name") or "open_clip's own"
    if vocabulary.largest >= clip.vocab_size:
        _refuse(spec, name, f"{clip.vocab_size} tokens", f"more than its largest, {vocabulary.largest}", "vocabulary")
    if hasattr(tower, "config"):
        _check_hugging_face(tower.config, vocabulary, spec, name)
        return
    pool, eos = (getattr(clip, f"text_{key}", getattr(tower, key, None)) for key in ("pool_type", "eos_id"))
    if getattr(tower, "cls_emb", None) is not None:  # it is pooled there, and the padding is masked
        if tower.pad_id != vocabulary.padding:
            _refuse(spec, name, tower.pad_id, vocabulary.padding, "text_cfg.pad_id")
    elif pool == "first" and tower.attn_mask is not None:
        _refuse(spec, name, "first, which sees no other token under a causal mask", "argmax, eos or last", "pool_type")
    elif pool == "eos" and vocabulary.end != eos:
        _refuse(spec, name, eos, _end(vocabulary), "text_cfg.eos_id")
    elif pool == "argmax" and vocabulary.end != vocabulary.largest:
        got = f"argmax, the largest token of a text, up to {vocabulary.largest}"
        end = "last" if vocabulary.end is None else f"eos with text_cfg.eos_id = {vocabulary.end}"
        _refuse(spec, name, got, f"{end}, for its texts end with {_end(vocabulary)}", "text_cfg.pool_type")


def check_sizes(clip: Clip, spec: ModelSpec) -> None:
    """Raises UserError where a tower of `clip` ends in another width than `embed_dim`, or takes images of one size only
    that is not the model's: both would fail in the first forward."""
    wanted, tower, trunk = spec.model_cfg["embed_dim"], text_tower(clip), getattr(clip.visual, "trunk", None)
    faults = []
    if hasattr(tower, "config") and not hasattr(tower, "proj"):
        faults.append(("text_cfg.hf_proj_type null", f"linear or mlp, for the tower is not {wanted} wide"))
    if not hasattr(tower, "config") and tower.text_projection is None and tower.ln_final.weight.numel() != wanted:
        faults.append(("text_cfg.proj_type none", f"linear, for text_cfg.width is not embed_dim = {wanted}"))
    if trunk is not None:
        embed = getattr(trunk, "patch_embed", None)
        if embed is not None and getattr(embed, "strict_img_size", False) and embed.img_size[0] != spec.image_size:
            only = f"{embed.img_size[0]}, the only size that the tower takes"
            faults.append((f"vision_cfg.image_size {spec.image_size}", only))
        if spec.model_cfg["vision_cfg"].get("timm_proj") == "none" and trunk.num_features != wanted:
            faults.append(("vision_cfg.timm_proj none", f"linear, for the tower is not embed_dim = {wanted} wide"))
    for got, expected in faults:
        raise UserError(f"the sizes of model {spec.name} do not go together", got=got, expected=expected)


def _check_hugging_face(config: Any, vocabulary: _Vocabulary, spec: ModelSpec, name: str) -> None:
    if config.pad_token_id != vocabulary.padding:
        _refuse(spec, name, config.pad_token_id, f"{vocabulary.padding}, its padding", "pad_token_id of the config")
    absolute = config.model_type in ("bert", "roberta", "xlm-roberta")
    first = 0 if config.model_type == "bert" else vocabulary.padding + 1  # RoBERTa counts places from there
    if absolute and spec.context_length + first > config.max_position_embeddings:
        at_most = f"at most {config.max_position_embeddings - first}, for the tower knows no more places"
        _refuse(spec, name, spec.context_length, at_most, "text_cfg.context_length")


def _refuse(spec: ModelSpec, tokenizer: str, got: object, expected: object, setting: str) -> None:
    raise UserError(
        f"the text tower of model {spec.name} does not fit its tokenizer, {tokenizer}",
        got=f"{setting} {got}",
        expected=expected,
        remedy="set text_cfg.hf_tokenizer_name to the folder of the tower's own tokenizer, or the setting as expected",
    )


def _vocabulary(tokenizer: SimpleTokenizer | HFTokenizer) -> _Vocabulary:
    if isinstance(tokenizer, SimpleTokenizer):
        return _Vocabulary(max(tokenizer.encoder.values()), tokenizer.eot_token_id, 0)
    inner, row = tokenizer.tokenizer, tokenizer(_PROBE)[0].tolist()
    largest, padding = max(inner.get_vocab().values()), inner.pad_token_id
    text = row[: max((place + 1 for place, token in enumerate(row) if token != padding), default=0)]
    ends = {end for end in (inner.eos_token_id, inner.sep_token_id) if end is not None and end not in row[:1]}
    end = text[-1] if text and text[-1] in ends else padding if padding in ends and len(text) < len(row) else None
    return _Vocabulary(largest, end, padding)


def _end(vocabulary: _Vocabulary) -> str:
    return "no token of its own" if vocabulary.end is None else f"token {vocabulary.end}"


def check_memory(build: Callable[[], nn.Module], name: str) -> None:
    """Raises UserError where the fp32 weights alone of what `build` makes are more than this machine has free."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            needed = 4 * sum(parameter.numel() for parameter in build().parameters())
    except Exception:  # a tower that cannot be laid out without memory is small, or fails when it is built
        return
    free = free_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"model {name} is larger than this machine's memory",
            got=f"{needed / 2**30:,.1f} GiB of fp32 weights",
            expected=f"at most {free / 2**30:,.1f} GiB, which are free",
            remedy="choose a smaller architecture, or a machine with more memory",
        )


def free_bytes() -> int | None:
    """Memory that this process may still take, by the kernel's word and its control group's; None: not known."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        found += [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        cache = [line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")]
        found += [int(limit) - int(used) + sum(int(line.split()[1]) for line in cache)]
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        pass
    return min(found, default=None)
