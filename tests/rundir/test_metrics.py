"""metrics.jsonl after a crash: no line twice, none missing, whatever stood behind the checkpoint."""

import json
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.rundir.metrics import ASIDE, MetricsLog, read_metrics


def run_to(path, steps, saves=(), resume=0, position=None):
    """Train lines of `steps`; position after each step of `saves`."""
    log = MetricsLog(path, resume, position)
    positions = {}
    for step in steps:
        log.write("train", step=step, loss=1 / step)
        if step in saves:
            log.sync()
            positions[step] = log.position
    log.close()
    return positions


def train_steps(path):
    return [line["step"] for line in read_metrics(path) if line["kind"] == "train"]


@pytest.mark.parametrize("tail", [b"", b'{"kind": "tr', b'{"kind": "train", "step": 9', b"\0" * 40, b"\0\0\n{}\n"])
def test_cut_back_to_the_checkpoint(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    position = run_to(path, range(1, 9), saves=[5])[5]
    before = path.read_bytes()[: position["bytes"]]
    with open(path, "ab") as file:
        file.write(tail)
    run_to(path, range(6, 13), resume=5, position=position)
    assert train_steps(path) == list(range(1, 13))
    assert path.read_bytes().startswith(before)


def test_a_checkpoints_own_line_comes_after_its_position_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    position = run_to(path, range(1, 6), saves=[5])[5]
    log = MetricsLog(path, 5, position)
    assert log.checkpoint_steps == set()  # killed between the save and its line: the caller writes it
    log.write("train", step=6, loss=0.5)
    log.write("checkpoint", step=5)
    log.write("resume", step=5)
    log.close()
    again = MetricsLog(path, 5, position)
    again.close()
    assert again.checkpoint_steps == {5}
    assert [(line["kind"], line["step"]) for line in read_metrics(path)][-2:] == [("train", 5), ("checkpoint", 5)]


def test_without_a_position_step_numbers_decide(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_to(path, range(1, 9))
    MetricsLog(path, 4).close()
    assert train_steps(path) == [1, 2, 3, 4]


def test_a_file_that_lost_lines_is_told_and_does_not_stop_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    position = run_to(path, range(1, 9), saves=[8])[8]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    log = MetricsLog(path, 8, position)
    log.close()
    assert "lost or altered" in log.notes[0] and train_steps(path) == [1, 2, 3]
    path.unlink()
    log = MetricsLog(path, 8, position)
    log.close()
    assert log.notes and read_metrics(path) == []


def test_position_and_floats_are_exact(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write("train", step=1, loss=0.1 + 0.2, name="é")
    assert log.position == {"bytes": path.stat().st_size, "lines": 1}
    log.close()
    assert read_metrics(path)[0]["loss"] == 0.1 + 0.2
    continued = MetricsLog(path, 1, {"bytes": path.stat().st_size, "lines": 1})
    continued.write("train", step=2)
    assert continued.position == {"bytes": path.stat().st_size, "lines": 2}
    continued.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["train", "checkpoint", "garbage"])), max_size=20),
       tail=st.sampled_from([b"", b'{"kind": "tr']), step=st.one_of(st.none(), st.integers(0, 9)))
def test_every_whole_line_stays_or_is_put_aside(tmp_path, lines, tail, step):
    """Whatever stands in the file, and wherever the run goes on from; garbage stands in the way only where step numbers
    decide, and is refused there."""
    path, aside = tmp_path / "metrics.jsonl", tmp_path / ASIDE
    aside.unlink(missing_ok=True)
    whole = [b"\0\r{\n" if kind == "garbage" else json.dumps({"kind": kind, "step": number}).encode() + b"\n"
             for number, kind in lines]
    path.write_bytes(b"".join(whole) + tail)
    try:
        log = MetricsLog(path, step)
    except IntegrityError:
        assert step is not None and path.read_bytes() == b"".join(whole) + tail
        return
    log.close()
    there = b"".join(file.read_bytes() for file in (path, aside) if file.exists())
    assert sorted(there.split(b"\n")[:-1]) == sorted(line[:-1] for line in whole)
    assert aside.exists() == bool(log.notes)
    assert step is not None or path.read_bytes() == b""


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path):
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(path, 0)
    log.write("train", step=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # in the middle of the second line
    try:
        for step in range(2, 1000):
            with pytest.raises(OSError, match="File too large"):
                log.write("train", step=step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write("train", step=1000)
    assert log.position == {"bytes": path.stat().st_size, "lines": 1000}
    log.close()
    assert train_steps(path) == list(range(1, 1001))


def test_reading_refuses_what_is_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n{broken\n" + json.dumps({"step": 2}) + "\n")
    with pytest.raises(IntegrityError, match=":2: not a JSON line"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"torn": ')
    with pytest.raises(IntegrityError, match=":2: "):
        read_metrics(path)
    assert read_metrics(path, torn_tail=True) == [{"step": 1}]
    assert read_metrics(tmp_path / "absent") == []
