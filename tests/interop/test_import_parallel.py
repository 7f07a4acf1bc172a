"""Imported weights on several ranks: the reading shared by two, then tensor and pipeline parallel trunks.

One launch of two processes for all families: they import every model together, then compute the logits of each under
both splits, which are compared with transformers' here.
"""

import torch
from random_models import MODELS, save
from trunk_states import run_ranks

from megatron_encdec.interop.importing import import_model
from megatron_encdec.interop.names import canonical_weights
from megatron_encdec.interop.source import find, whole_trunk

RANKS = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_encdec.platform import device, distributed
device.choose("cpu")
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.engine.checkpoint import newest
from megatron_encdec.engine.loading import load_weights
from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.importing import import_model
from megatron_encdec.interop.source import find
from megatron_encdec.model.trunk import build_trunk

directory, names = Path(sys.argv[1]), sys.argv[2:]


def logits(trunk, topology, tokens_BS, kind):
    windows, length = tokens_BS.shape
    starts = torch.arange(0, windows * length + 1, length, dtype=torch.int32)
    context = trunk.attention_context(kind, starts, length, False, windows, length)
    if topology.pipeline_rank:
        hidden = torch.empty(length, windows, trunk.model.hidden_size)
        dist.recv(hidden, 0)
        trunk.set_input_tensor(hidden)
    hidden = trunk.hidden_states(tokens_BS, context)
    if not topology.last_stage:
        dist.send(hidden.contiguous(), 1)
        return None
    columns = trunk.logits(hidden, torch.arange(windows * length), windows).contiguous()
    parts = [torch.empty_like(columns) for _ in range(topology.tensor)]
    dist.all_gather(parts, columns, group=mcore.parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=1)[:, :trunk.model.vocabulary_size].view(windows, length, -1)


distributed.initialize()
for name in names:
    import_model(directory / name, directory / f"{name}-two", say=lambda _line: None)
mcore.parallel_state.destroy_model_parallel()
for tensor, pipeline in ((2, 1), (1, 2)):
    topology = distributed.initialize(tensor, pipeline)
    for name in names:
        source = find(str(directory / f"{name}-two"))
        model = source.config.model
        trunk = build_trunk(model, topology, torch.float32, 64, seed=9).eval()
        load_weights(source.checkpoint, trunk)
        tokens_BS = torch.arange(2 * 64).view(2, 64) * 7 % 301
        kind = TARGETS[source.imported["as"]].attention
        with torch.no_grad():
            found = logits(trunk, topology, tokens_BS, kind)
        if topology.last_stage and topology.tensor_rank == 0:
            torch.save(found, directory / f"{name}-{tensor}-{pipeline}.pt")
    dist.barrier()
    mcore.parallel_state.destroy_model_parallel()
"""


def test_every_family_on_two_ranks(topology, tokenizer_directory, tmp_path):
    models = {name: save(name, tmp_path / name, tokenizer_directory, file_size="40KB") for name in MODELS}
    run_ranks(2, RANKS, tmp_path, *models, timeout=240)
    tokens_BS = torch.arange(2 * 64).view(2, 64) * 7 % 301
    for name, model in models.items():
        with torch.no_grad():
            expected = model(tokens_BS).logits
        for split in ("2-1", "1-2"):  # tensor-pipeline
            found = torch.load(tmp_path / f"{name}-{split}.pt")
            assert (found - expected).abs().max() < 1e-4, (name, split)

    for name in ("llama3", "qwen2"):  # what two ranks wrote is what one writes
        import_model(tmp_path / name, tmp_path / f"{name}-one", say=lambda _line: None)
        one, two = (find(str(tmp_path / f"{name}-{count}")) for count in ("one", "two"))
        assert one.state.history_hash == two.state.history_hash
        with whole_trunk(one) as first, whole_trunk(two) as second:
            for (key, tensor), other in zip(canonical_weights(first).items(), canonical_weights(second).values(),
                                            strict=True):
                assert torch.equal(tensor, other), key
        files = sorted((tmp_path / f"{name}-two" / "checkpoints" / "step_00000000").glob("*.distcp"))
        small, large = sorted(file.stat().st_size for file in files)
        assert len(files) == 2 and large < 2 * small  # each had its share
