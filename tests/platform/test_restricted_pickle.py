"""Nothing in a checkpoint runs: a hostile pickle in every place that holds one, with checksums that agree."""

import builtins
import io
import os
import pickle
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from small_run import run_cli
from trunk_states import fill, make, state_at, wrong

from megatron_encdec.engine import loading
from megatron_encdec.engine.checkpoint import read_run_state
from megatron_encdec.engine.integrity import CHECKSUMS, checksums_text, verify
from megatron_encdec.engine.saver import Saver
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.platform.restricted_pickle import load_plain, load_records
from megatron_encdec.rundir.files import sha256_file


class Hostile:
    """Calls `function(*arguments)` wherever it is unpickled."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.fixture
def saved(topology, tmp_path):
    """(checkpoint, trunk, optimizer, the file that appears if anything runs)."""
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    saver = Saver(tmp_path / "run/checkpoints", trunk, optimizer, keep=1)
    saver.save(state_at(1))
    event, = saver.wait()
    return SimpleNamespace(path=event.path, trunk=trunk, optimizer=optimizer, mark=tmp_path / "it_ran")


def resign(directory):
    """What an attacker does after altering a file: checksums that agree with it."""
    files = {entry.name: (entry.stat().st_size, sha256_file(entry))
             for entry in directory.iterdir() if entry.name != CHECKSUMS}
    (directory / CHECKSUMS).write_text(checksums_text(files))
    assert verify(directory) == []


def payloads(mark):
    return [Hostile(os.system, f"touch {mark}"), Hostile(builtins.open, str(mark), "w"),
            Hostile(builtins.exec, f"open({str(mark)!r}, 'w')"), {"deep": [Hostile(os.mkdir, str(mark))]},
            Hostile(torch.save, 1, str(mark))]


def refused(saved, file, match=""):
    resign(saved.path)
    with pytest.raises(IntegrityError, match=f"{file}.*{match}") as error:
        loading.load(saved.path, saved.trunk, saved.optimizer)
    assert "\n" not in str(error.value) and not saved.mark.exists()


@pytest.mark.parametrize("number", range(5))
def test_metadata(saved, number):
    (saved.path / ".metadata").write_bytes(pickle.dumps(payloads(saved.mark)[number]))
    refused(saved, ".metadata", "refused: it asks for")


def test_metadata_with_a_payload_inside_a_real_record(saved):
    metadata = load_records(saved.path / ".metadata")
    metadata.planner_data = Hostile(os.mkdir, str(saved.mark))
    (saved.path / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(saved, ".metadata", "posix.mkdir")


def test_metadata_that_points_outside(saved, tmp_path):
    for elsewhere in ("../../../secret.distcp", str(tmp_path / "secret.distcp"), "common.pt"):
        metadata = load_records(saved.path / ".metadata")
        next(iter(metadata.storage_data.values())).relative_path = elsewhere
        (saved.path / ".metadata").write_bytes(pickle.dumps(metadata))
        refused(saved, ".metadata", "not beside it")


@pytest.mark.parametrize("number", range(5))
def test_common(saved, number):
    torch.save(payloads(saved.mark)[number], saved.path / "common.pt")
    refused(saved, "common.pt", "refused: ")


def test_common_as_a_bare_pickle(saved, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's switch back to running anything
    (saved.path / "common.pt").write_bytes(pickle.dumps(payloads(saved.mark)[0]))
    refused(saved, "common.pt")


def test_tensors(saved):
    """A box whose data.pkl is replaced, in a file of the same layout."""
    metadata = load_records(saved.path / ".metadata")
    index, place = next(iter(metadata.storage_data.items()))
    hostile = io.BytesIO()
    torch.save(payloads(saved.mark)[0], hostile)
    path = saved.path / place.relative_path
    with open(path, "ab") as file:
        place.offset, place.length = file.tell(), len(hostile.getvalue())
        file.write(hostile.getvalue())
    (saved.path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert zipfile.is_zipfile(hostile) and index.fqn
    refused(saved, "distcp")


def test_byte_items_are_not_read_at_all(saved):
    """What megatron.core stores as pickled bytes (`_extra_state`) is in a foreign checkpoint, and stays there."""
    metadata = load_records(saved.path / ".metadata")
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    hostile = pickle.dumps(payloads(saved.mark)[0])
    for key in ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", "anything"):
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__9_0.distcp", 0, len(hostile))
    (saved.path / "__9_0.distcp").write_bytes(hostile)
    (saved.path / ".metadata").write_bytes(pickle.dumps(metadata))
    resign(saved.path)
    loading.load(saved.path, saved.trunk, saved.optimizer)
    assert wrong(saved.trunk, saved.optimizer) == [] and not saved.mark.exists()
    key = "decoder.final_layernorm.weight"  # a tensor turned into bytes is no tensor
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    (saved.path / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(saved, ".metadata", key)


def test_our_own_files_are_json(saved):
    for name in ("run_state.json", CHECKSUMS):
        whole = (saved.path / name).read_bytes()
        (saved.path / name).write_bytes(pickle.dumps(payloads(saved.mark)[0]))
        with pytest.raises(IntegrityError, match=name):
            loading.load(saved.path, saved.trunk)
        if name == "run_state.json":
            with pytest.raises(IntegrityError, match=name):
                read_run_state(saved.path)
        (saved.path / name).write_bytes(whole)
    assert not saved.mark.exists()


def test_what_real_checkpoints_hold_is_read(saved):
    assert load_records(saved.path / ".metadata").state_dict_metadata
    assert load_plain(saved.path / "common.pt")["optimizer"]
    with pytest.raises(IntegrityError, match="missing"):
        load_plain(saved.path / "absent.pt")


def test_inspect_and_export_run_nothing(saved, tmp_path):
    run = saved.path.parent.parent
    torch.save(payloads(saved.mark)[0], saved.path / "common.pt")
    (saved.path / ".metadata").write_bytes(pickle.dumps(payloads(saved.mark)[0]))
    resign(saved.path)
    shown = run_cli("inspect", "checkpoint", run, "--tensors", check=False)
    assert shown.returncode == 2 and ".metadata: refused" in shown.stderr
    assert run_cli("export", run, tmp_path / "out", check=False).returncode == 2
    assert not saved.mark.exists()
    shutil.rmtree(run)
