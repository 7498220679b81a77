"""Which patches are kept: a hash of the sample, fair over patches, in place of the tower's own draw."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from pretrain.stream.draw import Draw, Purpose
from pretrain.towers.adapt.patch_dropout import PatchDropout, kept_patches
from pretrain.towers.build import DualEncoder

BITS = tiny.patch_bits(1, 0, range(4000))


def test_every_patch_is_kept_as_often_and_pairs_are_independent():
    kept = kept_patches(BITS, 49, 0.5)
    assert kept.shape == (4000, 24)
    assert (kept[:, 1:] > kept[:, :-1]).all()
    chosen = torch.zeros(4000, 49).scatter_(1, kept, 1.0)
    deviation = (24 / 49 * 25 / 49 / 4000) ** 0.5
    assert (chosen.mean(dim=0) - 24 / 49).abs().max() < 4.5 * deviation
    pairs = torch.corrcoef(chosen.T) + torch.eye(49).mul(-1 - 1 / 48) + 1 / 48  # without replacement: -1/48
    assert pairs.abs().max() < 5.5 / 4000**0.5
    neighbours = (chosen[1:] * chosen[:-1]).sum(dim=1).mean()  # of samples with ids beside each other
    assert abs(neighbours - 24 * 24 / 49) < 0.3


def test_the_hash_is_frozen():
    assert kept_patches(BITS[:2], 16, 0.5).tolist() == [[0, 4, 6, 7, 9, 10, 12, 13], [0, 6, 7, 8, 10, 12, 13, 14]]


def test_epochs_and_seeds_differ_and_bits_fit_a_tensor():
    for other in ((1, 1), (2, 0)):
        assert not torch.equal(BITS, tiny.patch_bits(*other, range(4000)))
    unsigned = [Draw(1, 0, number).bits(Purpose.PATCHES) for number in range(4000)]
    assert BITS.numpy().view(np.uint64).tolist() == unsigned


@pytest.mark.parametrize(
    "vision_cfg",
    [
        {"patch_dropout": 0.5},
        {"timm_model_name": "test_vit", "image_size": 64, "timm_pool": "avg", "timm_proj": "linear"},
        {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224, "timm_pool": "token", "timm_proj": "linear"},
    ],
)
def test_ours_stands_in_every_kind_of_tower(vision_cfg):
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"] = {**({} if "timm_model_name" in vision_cfg else cfg["vision_cfg"]), **vision_cfg}
    cfg["vision_cfg"]["patch_dropout"] = 0.5
    size = cfg["vision_cfg"]["image_size"]
    preprocess = {**tiny.SPEC.preprocess_cfg, "size": size}
    model = DualEncoder(replace(tiny.SPEC, model_cfg=cfg, preprocess_cfg=preprocess))
    assert isinstance(model.patch_dropout, PatchDropout)
    assert model.patch_dropout.prefix_tokens == 1
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        features = lambda rows, bits: model(tiny.inputs(images[rows], bits))["rows"]["image"]  # noqa: E731
        both = slice(0, 2)
        whole = features(both, BITS[:2])
        halves = torch.cat([features(slice(row, row + 1), BITS[row : row + 1]) for row in (0, 1)])
        torch.testing.assert_close(whole, halves)
        assert not torch.allclose(whole, features(both, BITS[2:4]))
        with pytest.raises(ValueError, match="random bits"):
            features(both, None)
        model.eval()
        torch.testing.assert_close(features(both, None), features(both, BITS[:2]))


def test_the_share_that_is_left_out_comes_with_the_rows():
    """What was mined brings bits alone, and goes by the share of its batch; then the architecture's own holds again."""
    layer, x = PatchDropout(0.5, prefix_tokens=1), torch.zeros(3, 17, 4)
    bits = {"patch_bits": BITS[:3]}
    lengths = []
    for rows in (bits | {"patch_dropout": torch.tensor(0.25, dtype=torch.float64)}, bits, {}):
        layer.take(rows)
        lengths.append(layer.train(bool(rows))(x).shape[1])
    layer.take(bits)
    lengths.append(layer.train()(x).shape[1])
    assert lengths == [1 + 12, 1 + 12, 1 + 16, 1 + 8]
