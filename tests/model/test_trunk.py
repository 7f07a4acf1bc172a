"""Attention is what the micro-batch says it is: probes on every attention path that runs on this machine.

A probe changes one token and looks at which positions' outputs move.
"""

import numpy as np
import pytest
import torch

from megatron_encdec.data.samples import Sample
from megatron_encdec.model.attention import AttentionContext, TorchAttention
from megatron_encdec.model.blocks import Blocks, reach, segment_mask
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.performance import PerformanceSettings
from megatron_encdec.model.rope import rotary_angles
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.objectives.base import Objective, Vocabulary, collate
from megatron_encdec.platform.device import device_type

LENGTH, VOCABULARY, MASK = 24, 101, 1


def trunk_of(topology, dtype=torch.float32, performance=None, **changes):
    sizes = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=VOCABULARY, init_std=0.2)
    return build_trunk(ModelConfig(**{**sizes, **changes}), topology, dtype, LENGTH, seed=5,
                       performance=performance)


def hidden_states(trunk, tokens_BS, kind, cuts):
    """[B, S, H] with segments cut at `cuts` in every window."""
    windows, length = tokens_BS.shape
    ends = sorted({*cuts, length})
    cu_seqlens = torch.tensor([0] + [b * length + end for b in range(windows) for end in ends], dtype=torch.int32)
    context = trunk.attention_context(kind, cu_seqlens, length, len(ends) > 1, windows, length)
    with torch.no_grad():
        return trunk.hidden_states(tokens_BS, context).transpose(0, 1)


def moved(trunk, kind, cuts, position, windows):
    """Positions whose output moves in window 0 when its token at `position` changes; other windows must not."""
    tokens_BS = torch.randint(2, VOCABULARY, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    changed_BS = tokens_BS.clone()
    changed_BS[0, position] = (tokens_BS[0, position] + 1 - 2) % (VOCABULARY - 2) + 2
    before, after = (hidden_states(trunk, tokens, kind, cuts) for tokens in (tokens_BS, changed_BS))
    difference_BS = (before - after).abs().amax(dim=-1)
    assert (difference_BS[1:] == 0).all()
    return set(torch.nonzero(difference_BS[0] > 1e-6).flatten().tolist())


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("cuts", "segment"), [((), range(LENGTH)), ((9, 17), range(9, 17))],
                         ids=["whole", "isolated"])
def test_what_a_token_reaches(topology, windows, dtype, groups, cuts, segment):
    trunk, position = trunk_of(topology, dtype, num_query_groups=groups), 12
    assert moved(trunk, "bidirectional", cuts, position, windows) == set(segment)
    assert moved(trunk, "causal", cuts, position, windows) == {s for s in segment if s >= position}


def test_both_attention_paths_of_torch_agree(topology):
    draw = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(7, 2, heads, 8, generator=draw) for heads in (4, 2, 2))
    attention = TorchAttention(trunk_of(topology).config, 1, None, None)
    cuts = torch.tensor([0, 3, 7, 14], dtype=torch.int32)
    angles_SD = rotary_angles(7, 8, 1e4, torch.device("cpu"))[0][:, None, None]
    for kind in ("causal", "bidirectional"):
        mask_B1SS = segment_mask(cuts, 2, 7, reach(kind, None), Blocks(7), torch.float32)
        outputs = [attention(query, key, value, None, packed_seq_params=AttentionContext(
            qkv_format="sbhd", kind=kind, cos=angles_SD.cos(), sin=angles_SD.sin(), mask_B1SS=mask_B1SS,
            blocks=Blocks(7), explicit=explicit)) for explicit in (False, True)]
        torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)


def test_a_segment_is_as_if_it_were_alone(topology):
    trunk = trunk_of(topology)
    tokens_BS = torch.randint(2, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    for kind in ("causal", "bidirectional"):
        inside = hidden_states(trunk, tokens_BS, kind, (9, 17))[:, 9:17]
        alone = hidden_states(trunk, tokens_BS[:, 9:17], kind, ())
        torch.testing.assert_close(inside, alone, atol=2e-6, rtol=1e-5)


def test_batch_size_does_not_change_a_window(topology):
    trunk = trunk_of(topology)
    tokens_BS = torch.randint(2, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    for kind in ("causal", "bidirectional"):
        together = hidden_states(trunk, tokens_BS, kind, ())
        for b in range(3):
            torch.testing.assert_close(together[b:b + 1], hidden_states(trunk, tokens_BS[b:b + 1], kind, ()),
                                       atol=2e-6, rtol=1e-5)


def loss_of(trunk, batch, summed=False):
    context = trunk.attention_context(batch.attention, torch.from_numpy(batch.cu_seqlens), batch.longest,
                                      batch.isolated, *batch.inputs_BS.shape)
    return trunk(*(torch.from_numpy(array) for array in (batch.inputs_BS,)), context,
                 torch.from_numpy(batch.label_positions_N), torch.from_numpy(batch.labels_N), summed)


def batch_of(objective, windows=2):
    draw = np.random.default_rng(3)
    samples = [Sample(i, 0, 0, i, draw.integers(2, VOCABULARY, LENGTH), np.array([10, LENGTH])) for i in range(windows)]
    vocabulary = Vocabulary(VOCABULARY, frozenset({0}), MASK)
    return collate(Objective.from_yaml(objective, "objective"), samples, 0, vocabulary)


@pytest.mark.parametrize("objective", ["clm", "mlm:0.5"])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_cross_entropy_at_the_labels(topology, objective, tied):
    """Against plain cross-entropy over all positions, the padded columns left out."""
    trunk, batch = trunk_of(topology, tied_embeddings=tied), batch_of(objective)
    hidden_BSH = hidden_states(trunk, torch.from_numpy(batch.inputs_BS), batch.attention, (10,))
    table_VH = (trunk.embedding.word_embeddings if tied else trunk.output_layer).weight[:VOCABULARY]
    logits_TV = (hidden_BSH @ table_VH.T).flatten(0, 1)
    expected_N = torch.nn.functional.cross_entropy(
        logits_TV[torch.from_numpy(batch.label_positions_N)], torch.from_numpy(batch.labels_N), reduction="none")
    torch.testing.assert_close(loss_of(trunk, batch), expected_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss_of(trunk, batch, summed=True), expected_N.sum(), atol=1e-4, rtol=1e-5)


def test_a_batch_without_labels_has_no_loss_and_no_gradient(topology):
    trunk, batch = trunk_of(topology), batch_of("mlm:0.5")
    empty = type(batch)(**{**vars(batch), "label_positions_N": np.zeros(0, np.int64),
                           "labels_N": np.zeros(0, np.int64)})
    assert loss_of(trunk, empty).numel() == 0
    total = loss_of(trunk, empty, summed=True)
    assert total.item() == 0
    total.backward()
    assert all(not p.grad.any() for p in trunk.parameters() if p.grad is not None)


def test_the_switch_changes_no_parameter(topology):
    trunk = trunk_of(topology)
    before = {name: (p.shape, p.detach().clone()) for name, p in trunk.named_parameters()}
    loss_of(trunk, batch_of("clm")), loss_of(trunk, batch_of("mlm"))
    after = dict(trunk.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, (_, value) in before.items())


@pytest.mark.parametrize("objective", ["clm", "mlm:0.5"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_segments_give_the_losses_and_gradients_of_masked_windows(topology, objective, qk_norm):
    """Cuts, rotary angles, rows of the labels: everything about the packed layout, through the whole trunk."""
    masked = trunk_of(topology, qk_norm=qk_norm)
    packed = trunk_of(topology, qk_norm=qk_norm, performance=PerformanceSettings(attention="packed"))
    assert (masked.packed, packed.packed) == (False, True)
    batch = batch_of(objective, windows=3)
    torch.testing.assert_close(loss_of(packed, batch), loss_of(masked, batch), atol=1e-5, rtol=1e-5)
    for trunk in (masked, packed):
        loss_of(trunk, batch, summed=True).backward()
    for (name, ours), (other, theirs) in zip(packed.named_parameters(), masked.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("recompute", ["mlp", "full"])
@pytest.mark.parametrize("attention", ["masked", "packed"])
def test_recomputing_changes_no_gradient(topology, recompute, attention):
    batch, gradients = batch_of("mlm:0.5"), []
    for settings in (PerformanceSettings(attention=attention),
                     PerformanceSettings(attention=attention, recompute=recompute)):
        trunk = trunk_of(topology, performance=settings).train()
        loss_of(trunk, batch, summed=True).backward()
        gradients.append({name: parameter.grad for name, parameter in trunk.named_parameters()})
    for name, before in gradients[0].items():
        assert torch.equal(before, gradients[1][name]), name


def test_the_fused_activation_is_the_same_function_with_the_same_gradients(topology):
    """To the bit on a CPU; the kernel that is compiled for a GPU rounds otherwise."""
    batch, found = batch_of("clm"), []
    for fused in (False, None):
        trunk = trunk_of(topology, performance=PerformanceSettings(fuse_activation=fused)).train()
        assert trunk.config.bias_activation_fusion == (fused is None)
        loss = loss_of(trunk, batch, summed=True)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in trunk.parameters())])
    near = {"atol": 1e-5, "rtol": 1e-5} if device_type() == "cuda" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(*found, **near)


@pytest.mark.parametrize(("longest", "bound"), [(1, 1), (2, 2), (3, 4), (9, 16), (17, 24), (24, 24)])
def test_bookkeeping_of_packed_segments(topology, longest, bound):
    """Windows laid end to end: cuts as they come, a bound on segments that takes few values, angles per window."""
    trunk = trunk_of(topology, performance=PerformanceSettings(attention="packed"))
    cuts = torch.tensor([0, 24 - longest, 24, 48], dtype=torch.int32)
    context = trunk.attention_context("causal", cuts, longest, True, 2, LENGTH)
    assert (context.qkv_format, context.kind, context.max_seqlen_q, context.max_seqlen_kv) == ("thd", "causal", bound,
                                                                                               bound)
    assert context.cu_seqlens_q is cuts and context.cu_seqlens_kv is cuts and context.mask_B1SS is None
    assert context.cos.shape == (2 * LENGTH, 1, 4) and torch.equal(context.cos[:LENGTH], context.cos[LENGTH:])
    assert context.cos[0].eq(1).all() and not context.sin[0].any()
