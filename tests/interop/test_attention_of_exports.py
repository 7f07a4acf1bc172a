"""Exported classes attend as their name says, in transformers itself, on every path that runs on a CPU.

A probe changes one token and looks at which positions' outputs move: eager and SDPA attention, a batch of one (where
masks are skipped) and a padded batch, the language-model class and the bare body.
"""

import pytest
import torch
import transformers
from random_models import MODELS, save

from megatron_encdec.interop.export import export
from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.importing import import_model

LENGTH, POSITION, PAD = 11, 5, 3
OF = {"llama": "llama2", "eurobert": "eurobert", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3",
      "smollm3": "smollm3", "modernbert": "modernbert", "modernbert-decoder": "modernbert-decoder",
      "gemma2": "gemma2-plain", "gemma3_text": "gemma3-wide", "olmo2": "olmo2", "olmo3": "olmo3-wide",
      "granite": "granite", "phi3": "phi3"}


@pytest.fixture(scope="module")
def exported(topology, tokenizer_directory, tmp_path_factory):
    """Target name -> directory of its export."""
    directory, found = tmp_path_factory.mktemp("probes"), {}
    for family, name in OF.items():
        save(name, directory / f"{family}-source", tokenizer_directory)
        import_model(directory / f"{family}-source", directory / f"{family}-run", say=lambda _line: None)
        for target in TARGETS.values():
            if target.family.name == family:
                export(str(directory / f"{family}-run"), directory / target.name, target.name, say=lambda _line: None)
                found[target.name] = directory / target.name
    return found


def moved(model, tokens_BS, mask_BS):
    """Positions of window 0 whose output moves when its token at POSITION changes; other windows must not."""
    changed_BS = tokens_BS.clone()
    changed_BS[0, POSITION] += 1
    with torch.no_grad():
        before, after = (model(input_ids=tokens, attention_mask=mask_BS)[0] for tokens in (tokens_BS, changed_BS))
    difference_BS = (before - after).abs().amax(dim=-1)
    assert (difference_BS[1:] == 0).all()
    return set(torch.nonzero(difference_BS[0] > 1e-6).flatten().tolist())


@pytest.mark.parametrize("auto", ["AutoModel", "head"])
@pytest.mark.parametrize("path", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TARGETS)
def test_what_a_token_reaches(exported, name, path, auto):
    target = TARGETS[name]
    auto_class = getattr(transformers, target.auto_class if auto == "head" else auto)
    model = auto_class.from_pretrained(exported[name], attn_implementation=path, dtype=torch.float32).eval()
    tokens_BS = torch.randint(9, 290, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    reached = set(range(LENGTH)) if target.attention == "bidirectional" else set(range(POSITION, LENGTH))
    for mask_BS in (None, torch.ones(1, LENGTH, dtype=torch.int64)):
        assert moved(model, tokens_BS[:1], mask_BS) == reached
    assert moved(model, tokens_BS, None) == reached

    mask_BS = torch.ones(3, LENGTH, dtype=torch.int64)
    mask_BS[0, -PAD:] = mask_BS[2, -2:] = 0
    assert moved(model, tokens_BS, mask_BS) - set(range(LENGTH - PAD, LENGTH)) == {
        position for position in reached if position < LENGTH - PAD}
    with torch.no_grad():  # padding changes nothing for the tokens that are there
        padded = model(input_ids=tokens_BS, attention_mask=mask_BS)[0][0, :-PAD]
        alone = model(input_ids=tokens_BS[:1, :-PAD])[0][0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_the_pipeline_fills_masks_with_every_encoder(exported):
    names = [name for name, target in TARGETS.items() if target.is_encoder]
    for name in names:
        fill = transformers.pipeline("fill-mask", str(exported[name]), device="cpu")
        assert type(fill.model).__name__ == TARGETS[name].model_class
        assert len(fill(f"the encoder {fill.tokenizer.mask_token} every word")) == 5
    assert {MODELS[OF[TARGETS[name].family.name]][0] for name in names} == {
        TARGETS[name].model_class for name in names}
