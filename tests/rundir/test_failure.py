"""failure.json: what goes wrong is recorded and goes on up, by whoever still holds the folder."""

import json

import pytest

from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.rundir.failure import forget_failure, noted_failure, read_failure
from megatron_encdec.rundir.lock import FolderLock


def fail_with(folder, error: BaseException, meanwhile=lambda: None):
    with FolderLock(folder) as lock, noted_failure(folder, lock.claim, lambda: 7):
        meanwhile()
        raise error


@pytest.mark.parametrize("kind", [RunFailed, UserError])
def test_a_failure_for_people_is_its_line(tmp_path, kind):
    with pytest.raises(kind, match="a loss"):
        fail_with(tmp_path, kind("a loss\n is nan"))
    found = read_failure(tmp_path)
    assert (found["reason"], found["step"], found["traceback"]) == ("a loss is nan", 7, None) and found["when"]


def test_any_other_one_has_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_with(tmp_path, ZeroDivisionError("by zero"))
    found = read_failure(tmp_path)
    assert found["reason"] == "ZeroDivisionError: by zero" and "in fail_with" in found["traceback"]
    forget_failure(tmp_path)
    forget_failure(tmp_path)
    assert read_failure(tmp_path) is None


def test_an_interruption_and_a_good_end_are_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_with(tmp_path, KeyboardInterrupt())
    with FolderLock(tmp_path) as lock, noted_failure(tmp_path, lock.claim, lambda: 7):
        pass
    assert read_failure(tmp_path) is None


def test_nothing_is_written_where_another_launch_has_the_folder(tmp_path):
    def taken():
        (tmp_path / "run.lock").write_text(json.dumps(json.loads((tmp_path / "run.lock").read_text()) | {"token": "x"}))

    with pytest.raises(RunFailed):
        fail_with(tmp_path, RunFailed("late"), taken)
    assert read_failure(tmp_path) is None


def test_a_folder_that_is_gone_hides_no_error(tmp_path):
    folder = tmp_path / "run"

    def removed():
        (folder / "run.lock").unlink()
        folder.rmdir()

    with pytest.raises(RunFailed, match="the first one"):
        fail_with(folder, RunFailed("the first one"), removed)


@pytest.mark.parametrize("content", ["", "[1]", '{"reason": 1}', "{"])
def test_what_is_no_record_is_none(tmp_path, content):
    (tmp_path / "failure.json").write_text(content)
    assert read_failure(tmp_path) is None
