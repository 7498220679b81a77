"""Images smaller than the architecture's: what a tower built for that size gives with open_clip's resized weights."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from data_tools.errors import UserError
from pretrain.config.tree import Phase
from pretrain.towers.adapt.patch_dropout import PatchPhases
from pretrain.towers.adapt.size import SizePhases, take_other_sizes
from pretrain.towers.build import DualEncoder
from pretrain.towers.initialise import initialise


def build(size, **vision):
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"] |= {"image_size": size, "patch_size": 8, **vision}
    torch.manual_seed(0)
    model = DualEncoder(replace(tiny.SPEC, model_cfg=cfg))
    take_other_sizes(model.clip.visual)
    return model


def shares(model, phases):
    """Of each phase and after them."""
    for adapter in (SizePhases(phases), PatchPhases(phases)):
        adapter.apply(model)
    return model.patch_shares


def images(size):
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}, {"no_ln_pre": True}])
def test_features_are_those_of_a_tower_of_that_size(vision):
    large, small = build(32, **vision).eval(), build(16, **vision).eval()
    report = initialise(small, large.export_state(), "the larger one")
    assert report.resized == ["visual.positional_embedding"]
    with torch.no_grad():
        torch.testing.assert_close(large.encode_image(images(16)), small.encode_image(images(16)), rtol=0, atol=1e-6)
        fresh = build(16, **vision).eval()
        assert not torch.allclose(large.encode_image(images(16)), fresh.encode_image(images(16)), atol=1e-3)


def test_patches_of_small_images_are_left_out_too():
    large, small = build(32, patch_dropout=0.5), build(16, patch_dropout=0.5)
    initialise(small, large.export_state(), "the larger one")
    with torch.no_grad():
        got, want = (model(tiny.inputs(images(16), torch.arange(3)))["rows"]["image"] for model in (large, small))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert not torch.allclose(got, large.eval().encode_image(images(16)), atol=1e-3)


def test_the_own_size_is_left_to_open_clip():
    model = build(32).eval()
    with torch.no_grad():
        got = model.encode_image(images(32))
        del model.clip.visual._embeds  # the method of the class again
        assert torch.equal(got, model.encode_image(images(32)))


def test_gradients_reach_every_position():
    model = build(32)
    model.encode_image(images(16)).square().mul(torch.arange(24)).sum().backward()
    assert (model.clip.visual.positional_embedding.grad.abs().sum(dim=1) > 0).all()


def test_a_tower_that_cannot_says_so():
    phase = Phase(until="1 steps", image_size=20)
    with pytest.raises(UserError, match="whole number of patches; got 20 pixels, patches of 8; remedy: set 16 or 24"):
        shares(build(32), [phase])
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"] = {"timm_model_name": "test_vit", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear"}
    timm = DualEncoder(replace(tiny.SPEC, model_cfg=cfg))
    with pytest.raises(UserError, match="one size only"):
        shares(timm, [phase])
    with pytest.raises(UserError, match="no place to leave patches out"):
        shares(timm, [Phase(until="1 steps", patch_dropout=0.5)])


def test_what_a_phase_is_silent_about_is_the_architectures():
    cheap = [Phase("1 steps", image_size=16), Phase("2 steps", patch_dropout=0.25), Phase("3 steps", patch_dropout=0.0)]
    assert shares(build(32, patch_dropout=0.5), cheap) == [0.5, 0.25, 0.0, 0.5]
    assert shares(build(32), cheap) == [None, 0.25, None, None]
