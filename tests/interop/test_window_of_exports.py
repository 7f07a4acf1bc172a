"""The edge of a sliding window in transformers' own classes, and in the trunk: the same token is the last one inside.

One layer, one token changed: what is inside its window moves, what is just outside does not. Eager attention and SDPA,
a batch of one and a padded one, decoders and the encoders that `is_causal: false` makes of them; ModernBERT's classes.
"""

import json

import pytest
import torch
import transformers
from random_models import save

from megatron_encdec.interop.export import export
from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.hugging_face import trunk_logits
from megatron_encdec.interop.importing import import_model
from megatron_encdec.interop.source import find, whole_trunk

LENGTH, POSITION, WINDOW, PAD = 30, 14, 6, 5
SLIDING = {"layer_types": ["sliding_attention"]}
ONE_LAYER = {"mistral": {}, "qwen2": {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None},
             "qwen3": {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None},
             "smollm3": {"use_sliding_window": True, "layer_types": None, "no_rope_layers": [0]},
             "modernbert": SLIDING, "modernbert-decoder": SLIDING, "olmo3": SLIDING, "phi3": {}, "gemma3_text": SLIDING,
             "gemma2": {**SLIDING, "attn_logit_softcapping": None}}
TARGETS_OF = {name: [name] if name.startswith("modernbert") else [name, f"{name}-bidirectional"] for name in ONE_LAYER}


@pytest.fixture(scope="module")
def exported(topology, tokenizer_directory, tmp_path_factory):
    """Target name -> (its run, the directory of its export, what the export said)."""
    directory, found = tmp_path_factory.mktemp("windows"), {}
    for name, changes in ONE_LAYER.items():
        window = {"local_attention": 2 * WINDOW} if name.startswith("modernbert") else {"sliding_window": WINDOW}
        model = {"gemma3_text": "gemma3"}.get(name, name)
        save(model, directory / name, tokenizer_directory, num_hidden_layers=1, **window, **changes)
        import_model(directory / name, directory / f"{name}-run", say=lambda _line: None)
        for target in TARGETS_OF[name]:
            lines = []
            assert export(str(directory / f"{name}-run"), directory / f"{target}-out", target, say=lines.append) < 1e-4
            found[target] = directory / f"{name}-run", directory / f"{target}-out", "\n".join(lines)
    return found


def reached(kind):
    if kind == "causal":
        return list(range(POSITION, POSITION + WINDOW))
    return list(range(POSITION - WINDOW, POSITION + WINDOW + 1))


def moved(logits, tokens_BS):
    """Positions of window 0 that move with its token at POSITION."""
    changed_BS = tokens_BS.clone()
    changed_BS[0, POSITION] += 1
    with torch.no_grad():
        difference_S = (logits(tokens_BS) - logits(changed_BS))[0].abs().amax(dim=-1)
    return torch.nonzero(difference_S > 1e-6).flatten().tolist()


@pytest.mark.parametrize("path", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [target for targets in TARGETS_OF.values() for target in targets])
def test_the_edge_is_the_same_in_both(exported, name, path):
    run, out, _ = exported[name]
    kind = TARGETS[name].attention
    model = getattr(transformers, TARGETS[name].auto_class).from_pretrained(
        out, attn_implementation=path, dtype=torch.float32).eval()
    tokens_BS = torch.randint(9, 290, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones(3, LENGTH, dtype=torch.int64)
    mask_BS[0, -PAD:] = mask_BS[2, -2:] = 0
    assert moved(lambda tokens: model(tokens).logits, tokens_BS[:1]) == reached(kind)
    assert moved(lambda tokens: model(tokens, attention_mask=mask_BS).logits, tokens_BS) == reached(kind)
    with whole_trunk(find(str(run))) as trunk, torch.no_grad():
        assert moved(lambda tokens: trunk_logits(trunk, tokens, kind), tokens_BS) == reached(kind)
        for length in (WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, LENGTH):
            ours, theirs = trunk_logits(trunk, tokens_BS[:, :length], kind), model(tokens_BS[:, :length]).logits
            assert (ours - theirs).abs().max() < 1e-4, length
        padded = model(tokens_BS, attention_mask=mask_BS).logits[0, :-PAD]
        assert (trunk_logits(trunk, tokens_BS[:1, :-PAD], kind)[0] - padded).abs().max() < 1e-4


def test_what_is_said_of_an_encoder_with_windows(exported):
    for name, (_, out, said) in exported.items():
        told = f"a token sees {WINDOW} tokens on either side" in said
        assert told == (name.endswith("bidirectional") and "gemma3" not in name)  # whose flash attention has the window
        assert f"flash attention would let it see {WINDOW - 1}" in (out / "README.md").read_text() or not told
        config = json.loads((out / "config.json").read_text())
        twice = config.get("local_attention") or config["sliding_window"] * (2 - (name == "gemma3_text-bidirectional"))
        assert twice == 2 * WINDOW
