"""What towers keep beside parameters: nothing that a checkpoint would lack, and exports have the clients' keys."""

import pytest
import torch
from open_clip import CustomTextCLIP
from transformers.models.bert.modeling_bert import BertEmbeddings

import checkpoints
import tiny
from data_tools.errors import UserError
from pretrain.config.registry import Entry
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import load_trained
from pretrain.towers.build import DualEncoder
from pretrain.towers.heads import HEADS, ProjectionConfig
from pretrain.towers.heads.equip import Equipment
from pretrain.towers.heads.projection import Projection
from pretrain.towers.initialise import initialise
from pretrain.towers.spec import resolve_spec
from text_towers import CONFIGS, architecture

TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
POSITIONS = "text.transformer.embeddings.position_ids"


def towers_of(name, folder):
    """A dual encoder of this kind; every tensor is random, so that a forgotten one shows."""
    torch.manual_seed(0)
    if name in CONFIGS:
        kind, settings, pooler = CONFIGS[name]
        kind(**settings).save_pretrained(folder)
        model = DualEncoder(resolve_spec(architecture(folder, hf_pooler_type=pooler)))
    else:
        changes = {"plain": {}, "custom text": {"custom_text": True}, "timm": {"vision_cfg": TIMM}}
        model = tiny.build(text_buckets=1, **changes[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def features(model):
    images = torch.arange(2 * 3 * model.spec.image_size**2, dtype=torch.uint8)
    tokens = model.tokenize(["a dog", "two red circles above a blue square"])
    with torch.no_grad():
        pixels = images.reshape(2, 3, model.spec.image_size, -1)
        return model.encode_image(pixels), model.encode_text(tokens)


@pytest.mark.parametrize("name", ["plain", "custom text", "timm", "bert", "roberta", "xlm-roberta", "mt5", "m2m_100"])
def test_a_checkpoint_holds_all_of_a_tower(tmp_path, name):
    model = towers_of(name, tmp_path)
    assert list(model.state_dict()) == [key for key, _ in model.named_parameters()]
    checkpoint = checkpoints.write(tmp_path / "run", 3, model)
    again = DualEncoder(model.spec).eval()
    CheckpointReader(checkpoint).load_into(again)
    for one, other, opened in zip(features(model), features(again), features(load_trained(checkpoint)), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, opened)


def keep_positions(monkeypatch):
    """transformers before 4.31: positions are part of the state."""
    built = BertEmbeddings.__init__

    def init(self, config):
        built(self, config)
        self.register_buffer("position_ids", self.position_ids.clone(), persistent=True)

    monkeypatch.setattr(BertEmbeddings, "__init__", init)


def test_tables_that_belong_to_the_state_are_rebuilt_and_exported(tmp_path, monkeypatch):
    keep_positions(monkeypatch)
    model = towers_of("bert", tmp_path)
    assert f"clip.{POSITIONS}" not in model.state_dict()
    CheckpointReader(checkpoints.write(tmp_path / "run", 3, model)).load_into(DualEncoder(model.spec))
    exported = model.export_state()
    cfg = {**model.spec.model_cfg, "text_cfg": {**model.spec.model_cfg["text_cfg"], "hf_model_pretrained": False}}
    client = CustomTextCLIP(**cfg)
    assert POSITIONS in client.state_dict()
    client.load_state_dict(exported)  # strict
    monkeypatch.undo()
    initialise(DualEncoder(model.spec), exported, "a file of before")
    wrong = exported | {POSITIONS: exported[POSITIONS] + 1}
    with pytest.raises(UserError, match=f"the weights of a file belong to other tables.*got {POSITIONS}"):
        initialise(DualEncoder(model.spec), wrong, "a file")


def test_other_numbers_beside_the_parameters_are_refused():
    """A tower of timm whose transform is a buffer of floats: `load_state_dict` would miss it at the resume."""
    with pytest.raises(UserError, match=r"that are no parameters; got visual\.trunk\.stem_dct\..*weights"):
        tiny.build(vision_cfg=TIMM | {"timm_model_name": "csatv2", "image_size": 512})


class Normed(Projection):
    """With running statistics."""

    def __init__(self, settings, model):
        super().__init__(settings, model)
        self.norm = torch.nn.BatchNorm1d(4)


def test_a_head_keeps_nothing_that_a_checkpoint_would_lack(monkeypatch):
    monkeypatch.setitem(HEADS, "projection", Entry(ProjectionConfig, f"{__name__}:Normed"))
    heads = {"it": ProjectionConfig()}
    with pytest.raises(UserError, match=r"head it keeps .* norm.running_mean.*persistent=False"):
        Equipment({"teacher_image": "stored"}, {"teacher_image": 7}, heads).give(tiny.build(), seed=0)
