"""What ranks tell each other: two processes over gloo."""

import os

import pytest
import torch.distributed as dist
from small_run import forks

from megatron_encdec.platform.distributed import Control
from megatron_encdec.platform.errors import AgreedError, UserError


def _refuse():
    raise UserError(f"a.yaml: a mistake that {os.getpid()} found")


def _rank(rank: int, store: str, answers, done) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    control, said = Control(timeout=60.0), {"pid": os.getpid()}
    said["highest"] = control.highest(7 - rank)
    said["gathered"] = control.gathered({"rank": rank})
    said["first"] = control.from_first(os.getpid)
    try:
        control.from_first(_refuse)
    except AgreedError as error:
        said["refused"] = str(error)
    impatient = Control(timeout=1.0)
    if rank == 0:
        try:
            impatient.highest(1)  # which rank 1 never answers
        except RuntimeError:
            said["lost"] = True
        done.set()
    done.wait()
    answers.put((rank, said))


def test_two_ranks_agree(tmp_path):
    context = forks()
    answers, done = context.Queue(), context.Event()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), answers, done)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    said = dict(answers.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join(300)
    first = said[0]["pid"]
    assert first != said[1]["pid"]
    for one in said.values():
        assert (one["highest"], one["gathered"], one["first"]) == (7, [{"rank": 0}, {"rank": 1}], first)
        assert one["refused"] == f"a.yaml: a mistake that {first} found"
    assert said[0]["lost"]


def test_one_rank_asks_nobody(topology):
    control = Control(timeout=1.0)
    assert (control.highest(3), control.gathered("x"), control.from_first(lambda: 5)) == (3, ["x"], 5)
    with pytest.raises(AgreedError, match="a mistake"):
        control.from_first(_refuse)
