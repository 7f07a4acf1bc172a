"""A flipped byte anywhere, and a file missing, cut short or added, is found and named before anything is loaded."""

import os
import random
import re

import pytest
from trunk_states import make, run_ranks

from megatron_encdec.engine import checkpoint, loading
from megatron_encdec.engine.integrity import CHECKSUMS, newest_intact, verify
from megatron_encdec.platform.errors import IntegrityError

FILES = ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "run_state.json", CHECKSUMS]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def test_an_intact_one(written):
    assert sorted(os.listdir(written / "step_00000002")) == sorted(FILES)
    assert verify(written / "step_00000002") == []
    assert newest_intact(written) == written / "step_00000002"
    assert newest_intact(written, before="step_00000002") == written / "step_00000001"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(name, topology, checkpoints):
    trunk, optimizer = make(topology)
    path = checkpoints / "step_00000002" / name
    whole = path.read_bytes()
    draw = random.Random(name)
    positions = range(len(whole)) if len(whole) < 900 else [0, len(whole) - 1, *draw.sample(range(len(whole)), 40)]
    for position in positions:
        flip(path, position)
        problem, = verify(path.parent)
        assert problem.startswith(f"{path}: ")
        path.write_bytes(whole)
    flip(path, len(whole) // 2)
    with pytest.raises(IntegrityError, match=f"{re.escape(str(path))}: .*step_00000001: use it with --fallback"):
        loading.load(path.parent, trunk, optimizer)
    assert newest_intact(checkpoints).name == "step_00000001"


@pytest.mark.parametrize("name", FILES)
def test_missing_and_cut_short(name, checkpoints):
    path = checkpoints / "step_00000002" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [problem.startswith(f"{path}: ") for problem in verify(path.parent)] == [True]
    path.write_bytes(whole + b"\n")
    assert [problem.startswith(f"{path}: ") for problem in verify(path.parent)] == [True]
    path.unlink()
    assert [problem.startswith(f"{path}: missing") for problem in verify(path.parent)] == [True]


def test_an_extra_file_and_an_unreadable_one(checkpoints):
    directory = checkpoints / "step_00000002"
    (directory / "__1_0.distcp").write_bytes(b"")
    assert verify(directory) == [f"{directory}/__1_0.distcp: not a file of this checkpoint; remove it"]
    (directory / "__1_0.distcp").unlink()
    (directory / "common.pt").unlink()
    (directory / "common.pt").mkdir()
    problem, = verify(directory)
    assert problem.startswith(f"{directory}/common.pt: ")


def test_where_none_is_intact_it_says_so(topology, checkpoints):
    for name in checkpoint.saved_names(checkpoints):
        flip(checkpoints / name / "__0_0.distcp", 5000)
    assert newest_intact(checkpoints) is None
    with pytest.raises(IntegrityError, match="no intact one beside it"):
        loading.load(checkpoints / "step_00000002", *make(topology))


def test_all_ranks_learn_what_one_of_them_found(checkpoints):
    flip(checkpoints / "step_00000002" / "metadata.json", 3)  # the share of one rank only
    told = run_ranks(2, """
        import sys
        from pathlib import Path
        from trunk_states import make
        from megatron_encdec.engine import loading
        from megatron_encdec.platform import distributed
        from megatron_encdec.platform.errors import IntegrityError
        trunk, optimizer = make(distributed.initialize())
        try:
            loading.load(Path(sys.argv[1]) / "step_00000002", trunk, optimizer)
        except IntegrityError as error:
            print(error)
        loading.load(Path(sys.argv[1]) / "step_00000001", trunk, optimizer)
        distributed.shutdown()
    """, checkpoints)
    assert told[0] == told[1] and "metadata.json: altered" in told[0]
