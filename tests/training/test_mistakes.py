"""A user's mistake is one clear line on stderr and exit code 2, whatever the verb."""

import json
import shutil

import pytest
import torch
from small_run import config_of

from megatron_encdec.cli import VERBS, main
from megatron_encdec.platform.errors import UserError


@pytest.fixture
def refuse(root, tmp_path, capsys):
    """A function: `pretrain` with overrides must fail with one line that holds all of `words`."""
    def call(*overrides, words=(), config=None):
        code = main(["pretrain", str(config or root / "config.yaml"), f"run.dir={tmp_path / 'run'}", *overrides])
        error = capsys.readouterr().err.strip()
        assert code == 2, error
        assert len(error.splitlines()) == 1, error
        assert "Traceback" not in error
        for word in words:
            assert word in error
        assert not (tmp_path / "run").exists()  # nothing half-made is left behind

    return call


@pytest.mark.parametrize(("override", "words"), [
    ("optimizer.lrr=1", ("optimizer.lrr", "did you mean 'lr'")),
    ("optimzer.lr=1", ("optimzer", "did you mean 'optimizer'")),
    ("optimizer.lr=fast", ("optimizer.lr", "expected a number", "'fast'")),
    ("batch.micro_size=2.5", ("batch.micro_size", "expected an integer", "2.5")),
    ("data.isolate_documents=1", ("data.isolate_documents", "true or false")),
    ("phases.1.objective.mask_ratio=1.0", ("phases.1.objective.mask_ratio", "1.0")),
    ("phases.1.objective.mask_ratio=0", ("phases.1.objective.mask_ratio",)),
    ("phases.0.objective=clmm", ("phases.0.objective.name", "did you mean 'clm'")),
    ("phases.0.objective={name: clm, mask_ratio: 0.4}", ("mask_ratio", "clm")),
    ("phases.1.objective={name: mlm, masking: 0.3}", (
        "objective.masking", "'mask_ratio' (share of the ordinary tokens to predict, ", "'mask_fraction' (share of")),
    ("schedule.name=wsdd", ("not one of wsd, cosine, constant; did you mean 'wsd'?",)),
    ("schedule.name=linear", ("'linear' is not one of wsd, cosine, constant",)),
    ("schedule.warmup=5", ("schedule.warmup", "'warmup_steps' (", "or 'warmup_tokens' (")),
    ("phases=[]", ("phases", "empty")),
    ("phases.7.steps=2", ("phases.7",)),
    ("run.total.steps=13", ("13", "6 + 6")),
    ("batch.global_size=1000000000000", ("batch.global_size: 1,000,000,000,000 windows", "more than a step can have")),
    ("phases.1.batch={global_size: 1000000000000}", ("phases.1.batch.global_size: 1,000,000,000,000 windows",)),
    ("phases.1.batch={global_size: 1000000, ramp: {from: 2, tokens: 10}}", (
        "phases.1.batch.ramp.from: 2 windows lead up to 1,000,000 in 499,999 sizes", "give a larger one")),
    ("evaluation.batches=1000000000", ("evaluation.batches: 1,000,000,000", "more than an evaluation can have")),
    ("batch.global_size=9", ("batch.global_size: 9", "micro_size=2")),
    ("parallel.tensor=2", ("parallel.tensor=2", "1 ranks")),
    ("parallel.context=2", ("parallel.context: 2",)),
    ("precision.fp8=current", ("precision.dtype: fp32 and fp8 exclude each other",)),
    ("precision={dtype: bf16, fp8: current}", ("precision.fp8", "no CUDA GPU")),
    ("performance.overlap_tensor=true", ("performance.overlap_tensor", "parallel.sequence")),
    ("performance.fuse_gradients=true", ("performance.fuse_gradients", "Apex")),
    ("performance.recompute=some", ("performance.recompute", "some")),
    ("precision.dtype=fp16", ("precision.dtype", "fp16")),
    ("model.layers=transformer_engine", ("transformer_engine", "CUDA")),
    ("phases.1.sliding_window=8", ("phases.1.sliding_window",)),
    ("model.layers_without_window=[0]", ("model.layers_without_window: no layer has a window",)),
    ("model.num_attention_heads=5", ("num_query_groups: 2 does not divide",)),
    ("data.train.0.path=/nowhere/text", ("/nowhere/text",)),
    ("data.train=[]", ("data.train",)),
    ("data.sequence_length=10000000", ("data.train.0.path", "10000000")),
    ("tokenizer.path=/nowhere", ("/nowhere",)),
    ("tokenizer.mask_token=<nope>", ("tokenizer.mask_token", "<nope>")),
    ("nonsense", ("'nonsense'", "dotted.key=value")),
])
def test_bad_values(refuse, override, words):
    refuse(override, words=words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_asked_for_where_none_is(refuse, root, capsys):
    assert main(["pretrain", str(root / "config.yaml"), "--device", "cuda"]) == 2
    error = capsys.readouterr().err.strip()
    assert "no CUDA GPU" in error and len(error.splitlines()) == 1


def test_parallel_sizes_against_heads_and_ranks(refuse, capsys, root, tmp_path):
    for nproc, overrides, word in [
            (3, ["parallel.tensor=3"], "parallel.tensor: 3 does not divide model.num_query_groups=2"),
            (2, ["parallel.tensor=4"], "does not divide the 2 ranks"),
            (4, ["parallel.pipeline=4"], "parallel.pipeline: 4 does not divide model.num_layers=2"),
            (8, [], "multiple of 16")]:
        assert main(["pretrain", str(root / "config.yaml"), f"run.dir={tmp_path / 'run'}", "--nproc", str(nproc),
                     *overrides]) == 2
        error = capsys.readouterr().err.strip()
        assert word in error and len(error.splitlines()) == 1


def test_broken_files(refuse, root, tmp_path):
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{root / 'text'}{suffix}", tmp_path / f"copy{suffix}")
    override = f"data.train=[{{path: {tmp_path / 'copy'}}}]"
    whole = (tmp_path / "copy.bin").read_bytes()
    (tmp_path / "copy.bin").write_bytes(whole[:-10])
    refuse(override, words=("copy.bin", f"{len(whole):,}", f"{len(whole) - 10:,}"))
    (tmp_path / "copy.bin").write_bytes(whole)
    index = (tmp_path / "copy.idx").read_bytes()
    (tmp_path / "copy.idx").write_bytes(index[:100])
    refuse(override, words=("copy.idx",))
    (tmp_path / "copy.idx").unlink()
    refuse(override, words=("copy.idx",))


def test_a_tokenizer_without_a_mask_token(refuse, root, tmp_path):
    shutil.copytree(root / "tokenizer", tmp_path / "maskless")
    (tmp_path / "maskless" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    file = tmp_path / "maskless" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|mask|>", "<|other|>"))
    refuse(f"tokenizer.path={tmp_path / 'maskless'}", words=("maskless", "tokenizer.mask_token", "<|reserved_0|>"))


def test_broken_config_files(refuse, tmp_path):
    for text, words in [("run: [", (":1:",)), ("a: 1\na: 2\n", (":2:", "given twice")), ("- 1\n", ("mapping",)),
                        ("run: {seed: 3}\noptimizer: {lr: 1e-3}\n",
                         ("tokenizer.path, data.train, model, phases: missing; every config must give",))]:
        (tmp_path / "bad.yaml").write_text(text)
        refuse(words=words, config=tmp_path / "bad.yaml")
    refuse(words=("no such config file",), config=tmp_path / "absent.yaml")


def test_what_is_not_one_of_few_is_not_told_twice():
    with pytest.raises(UserError) as refused:
        config_of("schedule.name=linear")
    assert str(refused.value).endswith("is not one of wsd, cosine, constant")


def test_help_of_every_verb(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert verb in capsys.readouterr().out
