"""Text towers of transformers, from a folder on this machine: of its config what is known to be harmless, of its
weights what is there. Nothing is fetched, and no code that lies in the folder is run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from open_clip.hf_model import HFTextEncoder

from data_tools.errors import UserError
from pretrain.towers.allowed import check_text_config
from pretrain.towers.files import few, read_json, weights_files
from pretrain.towers.quiet import quiet
from pretrain.towers.spec import refuse_code
from pretrain.towers.weights_file import refuse_non_finite


@contextmanager
def allowed_folder(folder: str) -> Iterator[str]:
    """A folder that holds the allowed part of the config in `folder`, for open_clip to build the tower from.

    Raises:
        UserError: no config, a model that open_clip has no adapter for, or one that needs code of its own.
    """
    path = Path(folder) / "config.json"
    refuse_code(path)
    config = check_text_config(read_json(path), str(path))
    with tempfile.TemporaryDirectory(prefix="dualstream-") as own:
        (Path(own) / path.name).write_text(json.dumps(config))
        with quiet():
            yield own


def load_text_weights(tower: HFTextEncoder, folder: str) -> str:
    """Give open_clip's `HFTextEncoder` the weights that lie in `folder`; its projection stays as built. Returns what
    was loaded, for the user.

    Raises:
        UserError: weights that cannot be read, or are another model's.
    """
    if not weights_files(Path(folder)):
        return f"text tower {folder}: no weights there, it starts at random"
    if (Path(folder) / "adapter_config.json").is_file():  # transformers would follow it to another model
        raise UserError(f"{folder} is an adapter of peft", remedy="merge it into its model, and name that folder")
    refuse_code(Path(folder) / "config.json")
    from transformers import AutoModel  # late: it is a second that other towers do not need

    config, extra = tower.config, {}
    if not config.is_encoder_decoder:
        extra["add_pooling_layer"] = getattr(tower.transformer, "pooler", None) is not None
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # what is missing is drawn
            whole, report = AutoModel.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                local_files_only=True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are named below, not in a table
                output_loading_info=True,
                **extra,
            )
        odd = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
        if odd:
            raise UserError(f"the weights in {folder} have other sizes than its config", got=few(odd))
        loaded = (whole.encoder if config.is_encoder_decoder else whole).state_dict()
        refuse_non_finite(loaded, folder)
        tower.transformer.load_state_dict(loaded)
    except UserError:
        raise
    except Exception as error:  # transformers' faults share no class
        raise UserError(
            f"the weights of the text tower in {folder} cannot be loaded", got=f"{type(error).__name__}: {error}"
        ) from None
    missing = [key for key in sorted(report["missing_keys"]) if key.removeprefix("encoder.") in loaded or key in loaded]
    if len(missing) == len(loaded):
        raise UserError(f"the weights in {folder} are no {config.model_type}'s", got=f"none of {few(sorted(loaded))}")
    words = f"text tower {folder}: {len(loaded) - len(missing)} of {len(loaded)} tensors loaded"
    return words + (f", left as drawn: {few(missing)}" if missing else "") + "; its projection starts at random"
