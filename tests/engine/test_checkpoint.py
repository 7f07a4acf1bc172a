"""One format: written on any topology and under any layer spec, by us or by megatron.core, read on any other."""

import json
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from trunk_states import fill, give_fp8_state, make, run_ranks, state_at, wrong

from megatron_encdec.engine import checkpoint, loading
from megatron_encdec.engine.boxes import SHARDING, pieces
from megatron_encdec.engine.checkpoint import FORMAT, read_run_state
from megatron_encdec.engine.integrity import CHECKSUMS, checksums_text
from megatron_encdec.engine.optimizer import local_states, update_count
from megatron_encdec.engine.saver import Saver
from megatron_encdec.model import layers
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import sha256_file

LAYOUTS = {  # by number of ranks: tensor, pipeline, dtype, tied embeddings
    2: {"tp2": (2, 1, "float32", False), "pp2": (1, 2, "float32", True), "dp2": (1, 1, "bfloat16", False)},
    4: {"tp2_dp2": (2, 1, "bfloat16", True), "pp2_dp2": (1, 2, "float32", False)}}
READ_AND_WRITE = """
    import json, sys
    from pathlib import Path
    import torch
    from trunk_states import give_fp8_state, make, state_at, wrong
    from megatron_encdec.engine import checkpoint, loading
    from megatron_encdec.engine.optimizer import update_count
    from megatron_encdec.engine.saver import Saver
    from megatron_encdec.platform import distributed, megatron
    root = Path(sys.argv[1])
    for layout, (tensor, pipeline, dtype, tied) in json.loads(sys.argv[2]).items():
        topology = distributed.initialize(tensor, pipeline)
        trunk, optimizer = make(topology, topology.rank, getattr(torch, dtype), tied_embeddings=tied)
        give_fp8_state(trunk)
        loading.load(checkpoint.newest(root / layout), trunk, optimizer)
        saver = Saver(root / f"{layout}_back", trunk, optimizer, keep=1)
        saver.save(state_at(1))
        print(layout, wrong(trunk, optimizer), update_count(optimizer), saver.wait()[0].error)
        megatron.parallel_state.destroy_model_parallel()
    distributed.shutdown()
"""


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_there_and_back_on_other_topologies(ranks, topology, tmp_path):
    layouts = LAYOUTS[ranks]
    for layout, (_, _, dtype, tied) in layouts.items():
        trunk, optimizer = make(topology, dtype=getattr(torch, dtype), tied_embeddings=tied)
        give_fp8_state(trunk)
        fill(trunk, optimizer)
        saver = Saver(tmp_path / layout, trunk, optimizer, keep=1)
        saver.save(state_at(1))
        assert saver.wait()[0].error is None
    told = run_ranks(ranks, READ_AND_WRITE, tmp_path, json.dumps(layouts))
    assert told == ["".join(f"{layout} [] 7 None\n" for layout in layouts)] * ranks
    for layout, (_, _, dtype, tied) in layouts.items():
        fresh, fresh_optimizer = make(topology, seed=9, dtype=getattr(torch, dtype), tied_embeddings=tied)
        give_fp8_state(fresh)
        assert wrong(fresh, fresh_optimizer)
        loading.load(checkpoint.newest(tmp_path / f"{layout}_back"), fresh, fresh_optimizer)
        assert wrong(fresh, fresh_optimizer) == [] and update_count(fresh_optimizer) == 7


class NormThenLinear(mcore.ColumnParallelLinear):
    """Transformer Engine's fused layer as far as a checkpoint sees it: the norm's weight inside, extra state beside."""

    def __init__(self, input_size, output_size, *, config, **keywords):
        super().__init__(input_size, output_size, config=config, **keywords)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.epsilon = config.layernorm_epsilon

    def forward(self, x, *arguments, **keywords):
        """Norm, then linear."""
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.epsilon))

    def get_extra_state(self):
        """What TE has there: bytes, empty without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        """Nothing to take."""


@pytest.fixture
def fused(monkeypatch):
    """Build trunks as Transformer Engine's spec does: no norm modules, the norm inside the linear."""
    unfused = layers.parts_of

    def fused(kind, norm):
        return replace(unfused(kind, norm), before=mcore.IdentityOp, column=NormThenLinear)

    return lambda on: monkeypatch.setattr(layers, "parts_of", fused if on else unfused)


@pytest.mark.parametrize("first", [True, False], ids=["fused to torch", "torch to fused"])
def test_transformer_engines_names(first, fused, topology, tmp_path):
    built = []
    for is_fused in (first, not first):
        fused(is_fused)
        built.append(make(topology, seed=len(built)))
    names = [{name for name, _ in trunk.named_parameters()} for trunk, _ in built]
    inside = {f"decoder.layers.{n}.{norm}" for n in (0, 1)
              for norm in ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")}
    assert names[not first] - names[first] == inside and len(names[0]) == len(names[1])
    (source, source_optimizer), (target, target_optimizer) = built
    fill(source, source_optimizer)
    saver = Saver(tmp_path, source, source_optimizer, keep=1)
    saver.save(state_at(1))
    loading.load(saver.wait()[0].path, target, target_optimizer)
    assert wrong(target, target_optimizer) == [] and update_count(target_optimizer) == 7
    assert {piece.key for piece in pieces(source)} == {piece.key for piece in pieces(target)}


def state_for_megatron(trunk, optimizer, loading):
    weights = trunk.sharded_state_dict(metadata=SHARDING)
    return {"model": weights,
            "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=SHARDING)}


def test_megatron_core_reads_ours(written, topology):
    trunk, optimizer = make(topology, seed=4)
    state = state_for_megatron(trunk, optimizer, loading=True)
    state["model"] = {name: entry for name, entry in state["model"].items()
                      if not isinstance(entry, mcore.dist_checkpointing.ShardedObject)}
    loaded = mcore.dist_checkpointing.load(state, str(written / "step_00000002"))
    ours, ours_optimizer = make(topology)
    fill(ours, ours_optimizer)
    weights = dict(ours.named_parameters())
    assert loaded["model"].keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded["model"].items())
    assert loaded["optimizer"]["optimizer"]["param_groups"][0]["step"] == 7
    states = [state for buffer in ours_optimizer.chained_optimizers[0].buffers for state in buffer.param_index_map]
    for number, parameter in enumerate(states):
        for name, tensor in local_states(ours_optimizer)[parameter].tensors.items():
            assert torch.equal(loaded["optimizer"]["param_state"][number][name].flatten(), tensor)


def test_ours_reads_megatron_cores(topology, tmp_path):
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    mcore.dist_checkpointing.save(state_for_megatron(trunk, optimizer, loading=False), str(tmp_path))
    files = {entry.name: (entry.stat().st_size, sha256_file(entry)) for entry in tmp_path.iterdir()}
    (tmp_path / CHECKSUMS).write_text(checksums_text(files))
    fresh, fresh_optimizer = make(topology, seed=3)
    loading.load(tmp_path, fresh, fresh_optimizer)
    assert wrong(fresh, fresh_optimizer) == [] and update_count(fresh_optimizer) == 7


def test_another_shape_is_refused_by_name(written, topology):
    trunk, optimizer = make(topology, ffn_hidden_size=64)
    with pytest.raises(IntegrityError, match=r"\.metadata: decoder.layers.mlp.linear_fc1.weight has the shape"):
        loading.load(written / "step_00000001", trunk, optimizer)
    deeper, deeper_optimizer = make(topology, num_layers=3)
    with pytest.raises(IntegrityError, match="has the shape"):
        loading.load(written / "step_00000001", deeper, deeper_optimizer)


def test_weights_alone(written, topology):
    trunk, optimizer = make(topology, seed=2)
    before = [state.tensors["exp_avg"].clone() for state in local_states(optimizer).values()]
    loading.load(written / "step_00000001", trunk)
    assert wrong(trunk, None) == [] and update_count(optimizer) == 0
    after = [state.tensors["exp_avg"] for state in local_states(optimizer).values()]
    assert all(map(torch.equal, before, after))


def test_finding_one(checkpoints, tmp_path):
    assert checkpoint.directory_of(str(tmp_path)).name == "step_00000002"
    assert checkpoint.directory_of(f"{tmp_path}@1").name == "step_00000001"
    for run, why in ((f"{tmp_path}@3", "there are step_00000001, step_00000002"), (f"{tmp_path}@x", "no step number"),
                     (str(tmp_path / "absent"), "no checkpoint there")):
        with pytest.raises(UserError, match=why):
            checkpoint.directory_of(run)
    (checkpoints / "latest").write_text("step_00000009\n")
    with pytest.raises(IntegrityError, match="found: step_00000001, step_00000002"):
        checkpoint.newest(checkpoints)
    state = checkpoints / "step_00000001" / "run_state.json"
    assert read_run_state(state.parent) == state_at(1)
    state.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99"):
        read_run_state(state.parent)
    state.write_text(json.dumps({"format": FORMAT, "step": 1}))
    with pytest.raises(IntegrityError, match="run_state.json: has no phase, .*, versions; this checkpoint is damaged"):
        read_run_state(state.parent)


def test_a_reader_finds_the_newest_at_every_moment_of_saving_and_deleting(checkpoints):
    done = threading.Event()

    def save():
        for step in range(3, 150):
            temporary = checkpoints / f".step_{step:08d}.tmp"
            temporary.mkdir()
            checkpoint.publish(temporary, checkpoints / checkpoint.name_of(step))
            checkpoint.prune(checkpoints, 1, set())
        done.set()

    writer, found = threading.Thread(target=save), []
    writer.start()
    while not done.is_set():
        found.append(checkpoint.newest(checkpoints).name)
    writer.join()
    assert found == sorted(found) and len(set(found)) > 10
    for vanished in (lambda path: loading.load(path, None), read_run_state):
        with pytest.raises(IntegrityError, match="step_00000001: was deleted while it was read .*checkpoint.keep"):
            vanished(checkpoints / "step_00000001")
