"""Pointers in the place of files: recognised by their content, whatever the name."""

import os

import pytest

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import refuse_pointer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 123456789\n" % ("0" * 64)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "model.safetensors", "a.idx", "tokenizer.json"])
def test_a_pointer_is_refused_with_the_command_that_helps(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.*run `git lfs pull` in {tmp_path} "):
        refuse_pointer(tmp_path / name)
    (tmp_path / name).write_text("/annex/objects/SHA256E-s12--00.gz\n")
    with pytest.raises(UserError, match="a git-annex pointer.*git annex get"):
        refuse_pointer(str(tmp_path / name))


def test_what_is_no_pointer_is_let_through(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    (tmp_path / "text").write_text("about " + POINTER)
    (tmp_path / "long").write_text(POINTER + "x" * 2000)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("fifo", "text", "long", "empty", "absent", "."):
        refuse_pointer(tmp_path / name)
