"""The gradient of every weight is that of transformers' class: what a family's trunk learns is what the class would."""

import pytest
import torch
import torch.nn.functional as F
from random_models import MODELS, kind_of, save

from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.importing import Wish, import_model
from megatron_encdec.interop.names import canonical_name, to_hugging_face
from megatron_encdec.interop.source import find, whole_trunk

NAMES = [name for name in MODELS if name.partition("-")[0] in (
    "modernbert", "gemma2", "gemma3", "embeddinggemma", "olmo2", "olmo3", "granite", "phi3") or name == "llama-biases"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_class(topology, tmp_path, name):
    model = save(name, tmp_path / "hf")
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # whose gradient it would leave out
    windows, length = 2, 40
    draw = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, 300, (windows, length), generator=draw)
    positions_N = torch.arange(0, windows * length, 3)
    labels_N = torch.randint(0, 300, positions_N.shape, generator=draw)
    F.cross_entropy(model(tokens_BS).logits.flatten(0, 1)[positions_N], labels_N, reduction="sum").backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}

    import_model(tmp_path / "hf", tmp_path / "run", Wish(mask="none"), say=lambda _line: None)
    source = find(str(tmp_path / "run"))
    with whole_trunk(source) as trunk:
        starts = torch.arange(0, windows * length + 1, length, dtype=torch.int32)
        context = trunk.attention_context(kind_of(name), starts, length, False, windows, length)
        trunk(tokens_BS, context, positions_N, labels_N, summed=True).backward()
        found = {canonical_name(key): parameter.grad for key, parameter in trunk.named_parameters()}
        ours = to_hugging_face(found, trunk.model, TARGETS[source.imported["as"]].family.rows)
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (ours[key] - gradient).abs().max() < 2e-4 * max(1.0, gradient.abs().max()), key
