"""The verbs as Python functions: `from megatron_encdec import preprocess, pretrain, export, load_run`.

They are the verbs' own work under the same names of options, so what the command line does and what these do is the
same: `preprocess` writes token files, `pretrain` starts a run or continues it, `export` writes a Hugging Face model.
Each returns an object that prints what the verb prints. A mistake is a `UserError`, training that cannot go on a
`RunFailed`, an export that would compute something else a `ParityError`; nothing ends the process. docs/python.md is
the tour.

Work for several processes (`nproc`), or on another device than this process has used before (an export is made on the
CPU), is the verb itself in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_encdec.platform.errors import IntegrityError, ParityError, RunFailed, UserError

if TYPE_CHECKING:
    from megatron_encdec.inspection.loaded import LoadedRun
    from megatron_encdec.interop.exported import Exported
    from megatron_encdec.text.summary import Preprocessed
    from megatron_encdec.training.config import Config

    ConfigLike = str | os.PathLike | Mapping[str, Any] | Config

__all__ = ["IntegrityError", "ParityError", "RunFailed", "UserError", "dry_run", "export", "load_run", "preprocess",
           "pretrain"]


def preprocess(input: str | os.PathLike | Sequence[str | os.PathLike], tokenizer: str | os.PathLike,
               output: str | os.PathLike, **options: Any) -> "Preprocessed":
    """Text files to `output`.bin, .idx and .manifest.json, as `megatron-encdec preprocess` does it.

    input: files, directories, patterns or `hf:` datasets; one or a list. tokenizer: a directory or file; with
    `train_tokenizer=N` the directory to make one in. output: the prefix of the files. options: those of the verb, with
    underscores: train_tokenizer, validation_percent, text_key, join, where, workers, mask_token, eod_token, on_error,
    encoder; `--shard 1/4` is share=(1, 4) or "1/4".
    Called again it does nothing if nothing changed, and goes on if it was interrupted. Raises `UserError`.
    """
    from megatron_encdec.options import read
    from megatron_encdec.text.command import require
    from megatron_encdec.text.summary import preprocessed

    given = read("preprocess", input=input, tokenizer=tokenizer, output=output, **options)
    paths = [given.pop(name) for name in ("input", "tokenizer", "output")]
    require(*paths)
    return preprocessed(*paths, **given)


def pretrain(config: "ConfigLike", overrides: Sequence[str] | Mapping[str, Any] = (), *, nproc: int | None = None,
             until: int | None = None, fork: str | None = None, time_limit: str | None = None, fallback: bool = False,
             profile: str | None = None, device: str = "auto") -> "LoadedRun":
    """Start the run of `config`, or continue it, as `megatron-encdec pretrain` does it; the run, to look at.

    config: the path of a YAML file, the same as a dict, or a `Config`. overrides: `["optimizer.lr=1e-3"]` or
    `{"optimizer.lr": 1e-3}`. The other arguments are the verb's options: processes on this machine, the step to stop
    after, RUN_DIR[@STEP] to branch from, "3h30m", whether to pass over a damaged checkpoint, "10..12", "cpu" or "cuda".
    With `nproc` of 2 and more the verb runs in processes of its own. Stopped by a signal it saves and returns, and
    `finished` is False; a KeyboardInterrupt (a notebook's stop button) ends it at once, and the same call goes on from
    the newest checkpoint. Raises `UserError`, `RunFailed`.
    """
    from megatron_encdec.options import read
    from megatron_encdec.platform import device as devices
    from megatron_encdec.platform.launcher import at_least_one
    from megatron_encdec.training.config import load_config

    options = read("pretrain", nproc=nproc, until=until, fork=fork, time_limit=time_limit, fallback=fallback,
                   profile=profile, device=device)
    nproc, device = options["nproc"], options["device"]
    at_least_one("--nproc", nproc)
    whole = _with_overrides(config, overrides)
    directory = load_config(whole).run.dir  # a mistake is said before anything begins
    if (nproc or 1) > 1 or devices.chosen() not in (None, devices.meant(device)):
        _pretrain_by_command(whole, options)
    else:
        from megatron_encdec.training.command import run_here

        run_here(_arguments(whole, **options | {"nproc": None}))
    return load_run(directory)


def dry_run(config: "ConfigLike", overrides: Sequence[str] | Mapping[str, Any] = (), *, nproc: int = 1) -> str:
    """What `pretrain --dry-run` prints: the whole config, its phases in tokens, parameters, memory on `nproc` ranks,
    notes and warnings. Needs neither data nor tokenizer. Raises `UserError`."""
    from megatron_encdec.options import read
    from megatron_encdec.training.config import load_config
    from megatron_encdec.training.dry_run import describe

    ranks = read("pretrain", nproc=nproc)["nproc"]
    return describe(load_config(_with_overrides(config, overrides)), 1 if ranks is None else ranks)


def export(run: str | os.PathLike, out: str | os.PathLike, as_: str = "auto", dtype: str = "auto",
           force: bool = False) -> "Exported":
    """The checkpoint RUN_DIR[@STEP] as a Hugging Face model directory, as `megatron-encdec export` does it.

    The result has `path`, `model_class`, `attention`, `dtype`, `step`, and `difference`: the largest one between its
    logits and the run's, None where `out` was this very export already. Raises `UserError`, `ParityError`.
    """
    from megatron_encdec.interop.exported import Exported
    from megatron_encdec.options import read
    from megatron_encdec.platform import device

    given = read("export", run=run, out=out, as_=as_, dtype=dtype, force=force)
    if device.chosen() == "cuda":  # megatron.core is set up for it in this process; an export is made on the CPU
        _by_command("export", given["run"], given["out"], "--as", given["as_"], "--dtype", given["dtype"],
                    *["--force"] * given["force"])
        return Exported.read(out)
    from megatron_encdec.interop.export_command import export_here

    return Exported.read(out, export_here(**given))


def load_run(directory: str | os.PathLike) -> "LoadedRun":
    """A run directory, to look at: `step`, `finished`, `phases`, `metrics("train")`, `checkpoints`, `config`; printed,
    it is the table of `megatron-encdec inspect run`. Raises `UserError` where no step of a run is recorded there,
    as in an import or a merge."""
    from megatron_encdec.inspection.loaded import LoadedRun

    return LoadedRun(str(directory))


def _with_overrides(config: "ConfigLike", overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The config as a mapping; a file's own mistakes are refused by its name."""
    from megatron_encdec.platform import schema
    from megatron_encdec.training.config import Config, as_mapping

    data = as_mapping(config)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            schema.set_key(data, key, schema.to_dict(value))
    else:
        several = () if overrides is None else overrides
        if isinstance(several, str) or not isinstance(several, Iterable):
            several = [several]
        for override in several:
            schema.apply_override(data, override, Config)
    return data


def _arguments(config: dict[str, Any], **options: Any) -> argparse.Namespace:
    """The arguments of the verb `pretrain`, with its own defaults."""
    from megatron_encdec.cli import parser_of

    arguments = parser_of("pretrain").parse_args(["pretrain", "CONFIG"])
    return argparse.Namespace(**{**vars(arguments), "config": config, **options})


def _pretrain_by_command(config: dict[str, Any], options: dict[str, Any]) -> None:
    import yaml

    words = [word for name, value in options.items() if value not in (None, False)
             for word in [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        _by_command("pretrain", str(path), *words)


def _by_command(*words: str) -> None:
    """The verb in a process of its own; what it prints is printed here, its mistake is raised here."""
    process = subprocess.Popen([sys.executable, "-m", "megatron_encdec", *words], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
    said: list[str] = []  # the message of its end, if it has one
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            said = [line] if line.startswith("megatron-encdec: ") else [*said, line] if said else []
    except BaseException:
        process.terminate()
        raise
    finally:
        code = process.wait()
    if code:
        message = "".join(said).removeprefix("megatron-encdec: ").strip()
        raise (UserError if code == 2 else RunFailed)(message or f"megatron-encdec {words[0]}: exit code {code}")
