"""Jobs as processes of this machine: what each of several at a time may use."""

import os
import sys
import time

import pytest

from megatron_encdec.platform.children import available_cores
from megatron_encdec.study.jobs import Job
from megatron_encdec.study.local import LocalExecutor, shares_of_cores


class _Cores(Job):
    """A job that writes down which cores it may run on, and waits for a file."""

    @property
    def command(self) -> list[str]:
        file, end = str(self.folder / "cores"), str(self.folder.parent / "end")
        code = (f"import os, time\nopen({file!r}, 'w').write(str(sorted(os.sched_getaffinity(0))))\n"
                f"while not os.path.exists({end!r}): time.sleep(0.02)")
        return [sys.executable, "-c", code]


def _run(executor: LocalExecutor, folder, count: int) -> list[list[int]]:
    jobs = [_Cores(str(number), folder / str(number), [], [], lambda: None, bool, lambda: (0, 0))
            for number in range(count)]
    for job in jobs:
        assert executor.has_room(job)
        executor.start(job)
    found = []
    for job in jobs:
        while not (job.folder / "cores").exists() or not (job.folder / "cores").read_text().endswith("]"):
            time.sleep(0.02)
        found.append([int(core) for core in (job.folder / "cores").read_text().strip("[]").split(",")])
    (folder / "end").touch()
    while executor.running:
        executor.ended()
        time.sleep(0.02)
    return found


@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
def test_jobs_at_a_time_share_the_cores(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    one, other = _run(LocalExecutor(2, []), tmp_path, 2)
    assert len(one) == len(other) == len(mine) // 2 and not set(one) & set(other)
    assert sorted(os.sched_getaffinity(0)) == mine


def test_a_job_alone_has_all_of_them(tmp_path):
    assert _run(LocalExecutor(1, []), tmp_path, 1) == [sorted(os.sched_getaffinity(0))]


def test_more_jobs_than_cores_have_one_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert shares_of_cores(4) == [[3], [5], [3], [5]]
    assert shares_of_cores(2) == [[3], [5]]


def test_a_job_of_an_earlier_driver_keeps_its_share(tmp_path):
    """The next driver gives a new job the cores that it does not have."""
    first, second = LocalExecutor(2, []), LocalExecutor(2, [])
    old = _Cores("old", tmp_path / "old", [], [], lambda: None, bool, lambda: (0, 0))
    first.start(old)
    assert second.find([old]) == [old]
    new = _Cores("new", tmp_path / "new", [], [], lambda: None, bool, lambda: (0, 0))
    second.start(new)
    shares = [second._taken[key]["cores"] for key in ("old", "new")]
    assert shares == shares_of_cores(2)
    (tmp_path / "end").touch()
    while second.running:
        second.ended()
        time.sleep(0.02)
