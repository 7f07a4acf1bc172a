"""Every verb, in directories whose names hold what we separate with; and what wins where a name can be read twice."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from small_run import BASE, run_cli, run_tool

from megatron_encdec.cli import main
from megatron_encdec.engine.integrity import split_step
from megatron_encdec.finetune.config import FinetuneConfig
from megatron_encdec.finetune.config import load_config as load_finetune
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.corpus import hub_name
from megatron_encdec.text.inputs import list_files
from megatron_encdec.training.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
ODD = "a@7 b=c,d[e]f:g#h%i{j}k\"l'm~né*?&$!(n)\\"
RUN, OUT = "r@6: [x]=#1", "o@6 {y}"
# In this order, in the directory ODD: what each command must print, or None for a file that must be there then.
VERBS = [
    (["preprocess", "--input", "x[1].jsonl", "in[2]/*.jsonl", "--tokenizer", "t@k", "--train-tokenizer", "300",
      "--output", "d@1=a", "--validation-percent", "20", "--workers", "1"], "d@1=a: "),
    (["preprocess", "--input", "hf:z.jsonl", "--tokenizer", "t@k", "--output", "d,2", "--workers", "1"], "30 docu"),
    (["preprocess", "--merge", "d,2", "d,2", "--output", "m[3]", "--workers", "1"], "60 documents"),
    (["inspect", "data", "m[3]", "--tokenizer", "t@k"], "m[3]"),
    (["inspect", "data", "m[3]", "--verify"], "60"),
    (["pretrain", "c=f.yaml", f"run.dir={RUN}", "--until", "6"], "step 6  checkpoint saved"),
    (["pretrain", "c=f.yaml", f"run.dir={RUN}"], "step 12"),
    (["pretrain", "c=f.yaml", "run.dir=-fork", "--fork", f"{RUN}@6", "--until", "7"], "step 7"),
    (["inspect", "run", RUN, "./-fork"], RUN),
    (["inspect", "run", RUN, "--json", "./a=b"], '"runs"'),
    (["inspect", "run", RUN, "--sample", "3"], "sample 3"),
    (["inspect", "checkpoint", RUN], "step_00000012"),
    (["inspect", "checkpoint", f"{RUN}@6"], "step_00000006"),
    (["export", RUN, OUT], "EuroBertForMaskedLM"),
    (["export", f"{RUN}/@6", "clm"], "LlamaForCausalLM"),
    (["export", "--as=llama", "--", "-fork", "./-o"], "LlamaForCausalLM"),
    (["import", OUT, "i@2"], "run.from.path=i@2"),
    (["import", "--nproc=2", "--mask-token=<|mask|>", "--", OUT, "-i"], "run.from.path=-i"),
    (["finetune", "f=1.yaml", "results=r: #1", "--dry-run"], "r: #1: 1 runs"),
    (["study", "report", "t@r, {1}", "--output", "s=[1]"], "s=[1]/index.html"),
    (["tools/check_parity.py", f"{RUN}@12", OUT], "all equal"),
    (["tools/fill_masks.py", OUT], OUT),
    (["tools/masked_accuracy.py", "--data", "m[3]", f"[red]x={OUT}", OUT, "--windows", "2"], "[red]x"),
    (["tools/inspect_data.py", "m[3]"], "m[3]"),
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The inputs of VERBS; the working directory while the module runs."""
    directory = tmp_path_factory.mktemp("paths") / ODD
    (directory / "in[2]").mkdir(parents=True)
    (directory / "in2").mkdir()  # what in[2] would mean as a pattern
    lines = [json.dumps({"text": f"the encoder reads word {n} and a mask hides {n % 7}"}) + "\n" for n in range(90)]
    for number, name in enumerate(("x[1].jsonl", "in[2]/y.jsonl", "hf:z.jsonl")):
        (directory / name).write_text("".join(lines[number::3]))
    config = yaml.safe_load(BASE.format(root="."))
    config |= {"tokenizer": {"path": "t@k"}, "data": {"train": [{"path": "d@1=a"}], "sequence_length": 32,
                                                      "validation": [{"path": "d@1=a.validation"}]}}
    (directory / "c=f.yaml").write_text(yaml.safe_dump(config))
    (directory / "f=1.yaml").write_text(yaml.safe_dump({
        "results": "r", "models": [{"path": OUT}], "grid": {"learning_rates": [1e-5], "seeds": [0]},
        "datasets": [{"name": "a@b=c", "family": "SC", "train": "x[1].jsonl", "test": "x[1].jsonl"}]}))
    for score, run in enumerate(("lr1e-05_sd0", "lr1e-05_sd1")):
        folder = directory / "t@r, {1}" / "m@1: [x]" / "SC" / "d#: 1" / run
        folder.mkdir(parents=True)
        results = {split: {"score": 0.5 + score / 10} for split in ("validation", "test")}
        (folder / "results.json").write_text(json.dumps(results))
    (directory / "t@r, {1}" / "no: model").mkdir()
    with contextlib.chdir(directory):
        yield directory


def call(words: list[str]) -> int:
    """A verb, or a tool of tools/ as its user calls it; ranks are forked, so they get a process of their own."""
    if any(word.startswith("--nproc") for word in words):
        result = run_cli(*words, check=False, PYTHONPATH=str(ROOT))
        print(result.stdout, result.stderr)
        return result.returncode
    return run_tool(*words) if words[0].startswith("tools/") else main(words)


@pytest.mark.parametrize("number", range(len(VERBS)), ids=[" ".join(words[:2]) for words, _ in VERBS])
def test_every_verb_takes_such_paths(odd, capfd, number):
    words, said = VERBS[number]
    if words[-1] == "./a=b":
        shutil.copytree(RUN, "a=b", dirs_exist_ok=True)
    code = call(words)
    out, err = capfd.readouterr()
    assert code == 0, err
    assert said in out + err, out + err


def test_no_name_was_read_as_another(odd):
    """After VERBS: nothing has come into being but what they name."""
    there = {path.name for path in odd.iterdir() if not path.name.startswith((".", "d@1=a", "d,2", "m[3]"))}
    assert there == {"x[1].jsonl", "in[2]", "in2", "hf:z.jsonl", "t@k", "c=f.yaml", "f=1.yaml", "t@r, {1}", RUN, OUT,
                     "-fork", "clm", "-o", "i@2", "-i", "s=[1]", "a=b"}


@pytest.mark.parametrize(("word", "there", "meant"), [
    ("a", [], ("a", None)), ("a@3", ["a"], ("a", 3)), ("a@3", ["a", "a@3"], ("a@3", None)), ("a@3", [], ("a", 3)),
    ("a/@3", ["a", "a@3"], ("a/", 3)), ("a@3@4", ["a@3"], ("a@3", 4)), ("a@", ["a@"], ("a@", None)),
    ("me@host/a", ["me@host/a"], ("me@host/a", None)), ("me@host/a@12", ["me@host/a"], ("me@host/a", 12)),
    ("@5", ["@5"], ("@5", None)),
    ("a@", ["a"], "no step number"), ("a@b", [], "no step number.*'b'"), ("me@host/a", [], "no such directory"),
    ("a@-1", ["a"], "no step number"), ("a@²", ["a"], "no step number"), ("@5", [], "none is named before the @"),
])
def test_run_dir_at_step(tmp_path, monkeypatch, word, there, meant):
    monkeypatch.chdir(tmp_path)
    for name in there:
        Path(name).mkdir(parents=True)
    if isinstance(meant, tuple):
        assert split_step(word) == meant
    else:
        with pytest.raises(UserError, match=meant):
            split_step(word)


@pytest.mark.parametrize("path", [
    "runs/a: b", "[x]", "{x}", "1e5", "007", "on", "2024-01-01", "~", "~/a", "a #b", "#a", "a=b", " a ", "*a", "&a",
    "!a", "%a", "@a", "`a`", "'a", "a'b\"c", "a\nb", "né 🙂", "-", "- a", "a/", "a,b", "null", "\t"])
def test_an_override_of_a_path_is_taken_as_it_stands(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(BASE.format(root="x"))
    words = ["run.dir", "run.from.path", "tokenizer.path", "data.train.0.path"]
    config = load_config(tmp_path / "c.yaml", [f"{word}={path}" for word in words])
    assert {config.run.dir, config.run.from_.path, config.tokenizer.path, config.data.train[0].path} == {path}
    if path.isprintable():
        assert load_config(tmp_path / "c.yaml", [f"phases.1.name={path}"]).phases[1].name == path
    data = {"models": [{"path": "x"}], "datasets": [{"name": "d", "family": "SC"}]}
    for override in (f"results={path}", f"datasets.0.documents={path}", f"models.0.path={path}"):
        schema.apply_override(data, override, FinetuneConfig)
    optional = None if path in ("~", "null") else path  # the key may be null
    assert (data["results"], data["models"][0]["path"], data["datasets"][0]["documents"]) == (path, path, optional)
    with pytest.raises(UserError, match=f"model.run: {re.escape(path)}: not a run directory"):
        load_config(tmp_path / "c.yaml", [f"model.run={path}"])


def test_other_overrides_are_yaml_and_quotes_are_taken_off(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(BASE.format(root="x"))
    config = load_config(tmp_path / "c.yaml", [
        "run.dir='a # b'", "tokenizer.mask_token=null", "optimizer.lr=1e-4", "phases.1.objective=mlm:0.2",
        "data.validation=[{path: a}]", "data.train.0.weight=2"])
    assert (config.run.dir, config.tokenizer.mask_token, config.optimizer.lr) == ("a # b", None, 1e-4)
    assert config.data.validation[0].path == "a" and config.phases[1].objective.mask_ratio == 0.2
    assert config.data.train[0].weight == 2
    monkeypatch.chdir(tmp_path)
    Path("'q'").mkdir()
    assert load_config("c.yaml", ["run.dir='q'"]).run.dir == "'q'"
    for line, found in (("dir: 1e5", "a number"), ("dir: on", "a boolean"), ("dir: 2024-01-01", "date")):
        with pytest.raises(UserError, match=f"run.dir: expected a string, found {found}.*put it in quotes"):
            schema.build(Config, {**yaml.safe_load(BASE.format(root="x")), "run": schema.parse_yaml(line, "c")})


def test_patterns_and_hub_names_with_a_path_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a[1]/b.txt", "a1/c.txt", "a[1]/d[2].txt", "a[1]/d2.txt", "s:t/x.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    for pattern, found in (("a[1]/*.txt", ["a[1]/b.txt", "a[1]/d2.txt", "a[1]/d[2].txt"]), ("a?/*.txt", ["a1/c.txt"]),
                           ("a[1]/d[2].txt", ["a[1]/d[2].txt"]), ("*/d[2].txt", ["a[1]/d2.txt"])):
        assert [file.path for file in list_files([pattern])] == found
    assert hub_name("owner/name:config:split") == ("owner/name", "config", "split")
    assert hub_name("owner/name::validation") == ("owner/name", None, "validation")
    assert hub_name("owner/name") == ("owner/name", None, None)
    assert hub_name("s:t") == ("s:t", None, None) and hub_name("s:t:u") == ("s:t", "u", None)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("models", [{"path": "runs/_hidden"}], "'_hidden' cannot be the model's folder"),
    ("models", [{"path": "m", "name": "a/b"}], "'a/b' cannot be"),
    ("models", [{"path": "runs/baselines/"}], "'baselines' cannot be"),
    ("models", [{"path": "runs/a/.."}, {"path": "runs"}], "two have the same name"),
    ("datasets", [{"name": "d", "family": "IR", "train": "a", "test": "b", "train_set": "x/y"}], "train_set: 'x/y'"),
    ("grid", {"learning_rates": [1e-5, 1.0000001e-5]}, "would have the folder lr1e-05"),
])
def test_what_cannot_be_a_folder_of_results_is_refused(tmp_path, key, value, words):
    config = {"results": "r", "models": [{"path": "m"}],
              "datasets": [{"name": "d", "family": "SC", "train": "a", "test": "b"}], key: value}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=words):
        load_finetune(tmp_path / "f.yaml")


def test_a_name_that_is_not_utf8_is_refused(capsys):
    assert main(["inspect", "run", "caf\udce9"]) == 2
    assert "not UTF-8; rename" in capsys.readouterr().err
