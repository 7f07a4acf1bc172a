import json

import pytest
from corpora import write_tokens

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.manifest import InputFile, Settings, Skipped, TokenizerRecord, check_files


@pytest.fixture
def prefix(tmp_path):
    """A written and described pair of files: 2 documents, 5 tokens."""
    files = write_tokens(tmp_path / "d", [[3, 4, 0], [5, 0]])
    manifests.write(manifests.manifest_path(tmp_path / "d"), manifests.describe(
        files, bytes_in=30, characters=9, skipped={"empty": Skipped(1, ("a.txt:1",))},
        tokenizer=TokenizerRecord("f" * 64, 300, 0, None), settings=Settings("text", 0.0, "train"),
        inputs=(InputFile("a.txt", 30, 1),)))
    return tmp_path / "d"


def test_what_is_written_is_read(prefix):
    manifest = manifests.read(prefix)
    assert (manifest.documents, manifest.tokens, manifest.bin_bytes) == (2, 5, 10)
    assert manifest.skipped == {"empty": Skipped(1, ("a.txt:1",))}
    assert check_files(prefix) == manifest


def test_data_of_other_tools_has_no_manifest(prefix):
    manifests.manifest_path(prefix).unlink()
    assert check_files(prefix) is None


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_changed_sizes_are_refused_by_name(prefix, suffix, with_manifest):
    if not with_manifest:
        manifests.manifest_path(prefix).unlink()
    path = prefix.with_name(prefix.name + suffix)
    content = path.read_bytes()
    for changed, what in ((content[:-1], "truncated"), (content + b"\0", "appended"), (b"", "truncated")):
        path.write_bytes(changed)
        message = rf"d\{suffix}: .*{what}.*expected \d+ bytes, found {len(changed)}"
        with pytest.raises(IntegrityError, match=message):
            check_files(prefix)
    path.unlink()
    with pytest.raises(IntegrityError, match=rf"d\{suffix}: missing"):
        check_files(prefix)


def test_foreign_index_is_refused(prefix):
    path = prefix.with_name("d.idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(IntegrityError, match=r"d\.idx: not a Megatron index"):
        check_files(prefix)


def test_files_of_another_run_are_refused(prefix):
    """Same sizes, other counts: only the manifest can tell."""
    path = manifests.manifest_path(prefix)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"tokens": 4}))
    with pytest.raises(IntegrityError, match=r"d\.idx: has 5 tokens, .*manifest\.json says 4"):
        check_files(prefix)


@pytest.mark.parametrize("change", ["{", "[]", '{"documents": 1}', "tokenizer", None])
def test_malformed_manifest_is_refused_by_name(prefix, change):
    path = manifests.manifest_path(prefix)
    if change == "tokenizer":
        change = json.dumps(json.loads(path.read_text()) | {"tokenizer": None})
    path.write_text(change or path.read_text().replace('"shards": [\n    "', '"shards": [\n    "0'))
    with pytest.raises(UserError, match=r"d\.manifest\.json: "):
        manifests.read(prefix)


def test_an_altered_pointer_is_laid_to_the_index_where_the_manifest_vouches_for_the_tokens(prefix):
    path = prefix.with_name("d.idx")
    content = bytearray(path.read_bytes())
    last_pointer = 34 + 4 * 2 + 8  # of 2 documents
    content[last_pointer] ^= 2
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"d\.idx: altered: its last document ends at byte"):
        check_files(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".manifest.json"])
def test_a_pointer_of_git_lfs_is_not_called_damaged(prefix, suffix):
    with open(f"{prefix}{suffix}", "w") as file:
        file.write(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(UserError, match=rf"d\{suffix}: a Git LFS pointer.*git lfs pull"):
        check_files(prefix)


@pytest.mark.parametrize(("name", "command"), [
    ("docs", "--output {}/docs"),
    ("docs.validation", "--output {}/docs --validation-percent PERCENT")])
def test_what_is_missing_is_told_the_command_that_writes_it(tmp_path, name, command):
    """A validation split is written along with the other one: its own prefix would hold all of the text."""
    with pytest.raises(IntegrityError) as refused:
        check_files(tmp_path / name)
    assert str(refused.value) == f"{tmp_path / name}.bin: missing; copy it again, or write it with " + (
        "megatron-encdec preprocess --input TEXTS --tokenizer TOKENIZER " + command.format(tmp_path))
