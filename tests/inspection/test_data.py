"""inspect data: statistics against documents counted by hand, and windows as a run would read them."""

import json

import pytest

from megatron_encdec.data.config import DataConfig, SourceConfig
from megatron_encdec.data.samples import Samples
from megatron_encdec.text.tokenizer import load_tokenizer


def report_of(inspect, *arguments) -> dict:
    code, out, err = inspect("data", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_pair_without_manifest(inspect, tmp_path, write_pair):
    prefix = write_pair(tmp_path / "plain", [[1, 2, 3], [], [4]])
    report = report_of(inspect, prefix)
    assert (report["documents"], report["tokens"], report["empty_documents"]) == (3, 4, 1)
    assert report["dtype"] == "uint16" and not report["manifest"] and report["windows"] == []
    _, out, _ = inspect("data", f"{prefix}.bin")
    assert "3, 1 of them empty" in out and "none: written by another tool" in out


def test_what_preprocess_recorded(inspect, workspace):
    report = report_of(inspect, workspace / "corpus")
    manifest = json.loads((workspace / "corpus.manifest.json").read_text())
    assert report["bytes_per_token"] == manifest["bytes_in"] / manifest["tokens"]
    assert report["skipped"]["empty"]["count"] == 1
    _, out, _ = inspect("data", workspace / "corpus")
    assert manifest["fingerprint"] in out and "empty: 1 document(s), first " in out and "uint16" in out


def test_windows_are_the_samples_of_a_run(inspect, workspace):
    tokenizer = load_tokenizer(workspace / "tokenizer")
    config = DataConfig([SourceConfig(str(workspace / "corpus"))], seed=7, sequence_length=48)
    expected = [tokenizer.decode(Samples(config).sample(index).tokens_S) for index in range(3)]
    report = report_of(inspect, workspace / "corpus", "--tokenizer", workspace / "tokenizer", "--samples", 3,
                       "--sequence-length", 48, "--seed", 7)
    texts = [window["text"].replace("[END OF DOCUMENT]\n", "") for window in report["windows"]]
    assert texts == expected
    assert any("<|endoftext|>[END OF DOCUMENT]\n" in window["text"] for window in report["windows"])


def test_masks_are_the_ones_of_the_objective(inspect, workspace):
    report = report_of(inspect, workspace / "corpus", "--tokenizer", workspace / "tokenizer",
                       "--objective", "mlm:0.5")
    for window in report["windows"]:
        assert window["targets"] > 30 and window["text"].count("[MASK:") == window["targets"]
    _, out, _ = inspect("data", workspace / "corpus", "--tokenizer", workspace / "tokenizer",
                        "--objective", "clm", "--samples", 1)
    window = report_of(inspect, workspace / "corpus", "--tokenizer", workspace / "tokenizer",
                       "--objective", "clm", "--samples", 1)["windows"][0]
    assert window["text"].count("[NO TARGET:") == window["segments"] == 128 - window["targets"]
    assert "[NO TARGET:" in out and f"{window['targets']} targets" in out and "[MASK:" not in out


def test_berts_way_of_hiding(inspect, workspace):
    objective = "{name: mlm, mask_ratio: 0.5, mask_fraction: 0.4, random_fraction: 0.3}"
    _, out, _ = inspect("data", workspace / "corpus", "--tokenizer", workspace / "tokenizer",
                        "--objective", objective)
    assert all(mark in out for mark in ("[MASK:", "[RANDOM:", "[KEPT:"))


@pytest.mark.parametrize(("options", "words"), [
    (["--objective", "mlm"], "--objective needs --tokenizer"),
    (["--tokenizer", "TOKENIZER", "--objective", "mlm:1.5"], "mask_ratio: must be above 0 and below 1"),
    (["--tokenizer", "TOKENIZER", "--objective", "clmm"], "did you mean 'clm'"),
    (["--tokenizer", "TOKENIZER", "--sequence-length", "1"], "--sequence-length: 1 is not at least 2"),
    (["--tokenizer", "TOKENIZER", "--sequence-length", "900000"], "less than one window of --sequence"),
    (["--tokenizer", "TOKENIZER", "--samples", "-1"], "--samples -1 is negative"),
    (["--tokenizer", "nowhere"], "no tokenizer here"),
])
def test_mistakes_are_one_line(inspect, workspace, options, words):
    options = [str(workspace / "tokenizer") if option == "TOKENIZER" else option for option in options]
    code, out, err = inspect("data", workspace / "corpus", *options)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_another_tokenizer_is_refused(inspect, workspace, tmp_path, write_pair):
    other = tmp_path / "tokenizer.json"
    content = json.loads((workspace / "tokenizer" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    other.write_text(json.dumps(content))
    code, _, err = inspect("data", workspace / "corpus", "--tokenizer", other)
    assert code == 2 and "does not give the ids that" in err
    prefix = write_pair(tmp_path / "foreign", [[9999] * 200])  # no manifest to tell: the ids do
    code, _, err = inspect("data", prefix, "--tokenizer", other)
    assert code == 2 and "the data holds the id 9999" in err


def test_a_truncated_bin_is_refused_by_name(inspect, tmp_path, write_pair):
    prefix = write_pair(tmp_path / "short", [[1, 2, 3]])
    (tmp_path / "short.bin").write_bytes(b"\1\0")
    code, _, err = inspect("data", prefix)
    assert code == 2 and "short.bin" in err and err.count("\n") == 1


def test_verify_finds_a_flipped_bit_and_says_where(inspect, tmp_path, workspace):
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"copy{suffix}").write_bytes((workspace / f"corpus{suffix}").read_bytes())
    report = report_of(inspect, tmp_path / "copy", "--verify")
    assert report["verified"]["record"].endswith("copy.manifest.json") and not report["verified"]["new"]
    _, out, _ = inspect("data", tmp_path / "copy", "--verify")
    assert "1 shard(s) and the index" in out and "copy.manifest.json recorded" in out
    whole = (tmp_path / "copy.bin").read_bytes()
    (tmp_path / "copy.bin").write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    assert inspect("data", tmp_path / "copy")[0] == 0  # sizes and counts are right
    code, out, err = inspect("data", tmp_path / "copy", "--verify")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"copy.bin bytes 0..{len(whole):,} (shard 1 of 1): not the bytes that" in err


def test_verify_without_a_manifest_compares_with_the_first_look(inspect, tmp_path, write_pair):
    prefix = write_pair(tmp_path / "plain", [[1, 2, 3], [4]])
    _, out, _ = inspect("data", prefix, "--verify")
    assert "nothing to compare with yet" in out and "plain.fingerprint.json" in out
    _, out, _ = inspect("data", prefix, "--verify")
    assert "all as" in out and "plain.fingerprint.json recorded" in out
    (tmp_path / "plain.bin").write_bytes(b"\1\0\2\0\3\0\5\0")
    for _ in range(2):  # asking again does not make it right
        code, _, err = inspect("data", prefix, "--verify")
        assert code == 2 and "plain.bin bytes 0..8" in err
