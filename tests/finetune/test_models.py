"""Which models can be fine-tuned, what is said of the others, and that no head looks only backwards."""

import json

import pytest
import torch
from finetune_sets import write_model
from safetensors.torch import load_file, save_file

from megatron_encdec.finetune.config import ModelSource
from megatron_encdec.finetune.models import build_model, check_attention, encoder_config
from megatron_encdec.platform.errors import UserError


@pytest.mark.parametrize("kind", ["euro", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["SC", "TC", "QA", "IR"])
def test_every_family_sees_both_ways(root, kind, attention, family):
    """A later token changes what the first position gives, at batch size 1 too."""
    source = ModelSource(str(root / kind))
    model = build_model(source, family, ("a", "b")).eval()
    model.config._attn_implementation = attention
    check_attention(model, source)
    encoder = model.base_model
    ids = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        before, after = (encoder(input_ids=one).last_hidden_state[0, 0] for one in (ids, other))
    assert (before - after).abs().max() > 1e-6


def test_padding_changes_nothing(root):
    model = build_model(ModelSource(str(root / "euro")), "SC", ("a", "b")).eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3)).logits
        padded = model(input_ids=torch.tensor([[5, 6, 7, 2, 2]]),
                       attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
    assert torch.allclose(alone, padded, atol=1e-6)
    assert model.config.classifier_pooling == "mean"


def test_random_weights_are_not_the_models(root):
    path = str(root / "euro")
    torch.manual_seed(1)
    pretrained, drawn = (build_model(ModelSource(path, weights=weights), "IR") for weights in ("pretrained", "random"))
    assert not torch.equal(pretrained.layers[0].self_attn.q_proj.weight, drawn.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize(("config", "says"), [
    ('{"model_type": "t5"}', "model_type 't5' cannot be fine-tuned here"),
    ('{"model_type": "vit"}', "model_type 'vit' cannot be fine-tuned here"),
    ('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}', "code that comes with a model is never run"),
    ("{}", "its model_type is none of transformers"),
    ("{", "cannot be read as a model's config"),
])
def test_what_is_no_text_encoder_is_refused(tmp_path, config, says):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=says) as refused:
        encoder_config(ModelSource(str(tmp_path)))
    assert len(str(refused.value).splitlines()) == 1


def test_weights_that_do_not_fit(tmp_path):
    path = write_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="its weights are not those of its config"):
        build_model(ModelSource(str(path)), "IR")


def test_other_weights_beside_the_model_are_not_read(tmp_path):
    """A stale shard, or a copy under another name, is not what transformers loads: model.safetensors is."""
    path = write_model(tmp_path)
    mine = load_file(path / "model.safetensors")
    for name in ("model-00001-of-00009.safetensors", "old.safetensors"):
        save_file({name: tensor + 1 for name, tensor in mine.items()}, path / name)
    assert torch.equal(build_model(ModelSource(str(path)), "IR").embed_tokens.weight, mine["model.embed_tokens.weight"])
