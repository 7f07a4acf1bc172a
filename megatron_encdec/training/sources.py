"""The sources that a run reads: which key names each, and what is known of those whose files are gone.

    1. `sources(config)`                  every source with its key
    2. `open_train`, `open_validation`    opened, by path; what is not there is refused by its key
    3. `Past.of(config)`                  the fingerprints that the run itself has recorded

A run needs no file of a source that none of its steps to come reads: an `AbsentStore` has the fingerprint, which the
history asks for. Its path must be the one in the run's config.yaml, so that nothing else is taken for it.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.data.config import SourceConfig
from megatron_encdec.data.store import AbsentStore, TokenStore
from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.checkpoint import RunState, read_run_state
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.indexed import bin_path, idx_path
from megatron_encdec.training.config import Config, load_config
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.stretches import Stretch


def sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """The sources that a run of `config` reads, each with its key: of `data.train` only what a phase has of it."""
    return [*_train(config), *_validation(config)]


def missing_sources(config: Config) -> list[tuple[str, str]]:
    """(key, path) of each source whose files are gone and cannot be done without."""
    past = Past.of(config)
    found = [(key, source) for key, source in _train(config) if _gone(source) and source.path not in past.absent]
    found += [(key, source) for key, source in _validation(config) if _gone(source)]
    return [(f"{key}.path", source.path) for key, source in found]


def open_train(config: Config) -> dict[str, TokenStore | AbsentStore]:
    """The training sources by path. Raises `UserError` that names key and file of what cannot be opened, or is gone and
    cannot be done without."""
    given = _train(config)
    past = Past.of(config) if any(_gone(source) for _, source in given) else Past()
    return {source.path: AbsentStore(source.path, past.absent[source.path], f"{key}.path")
            if source.path in past.absent and _gone(source) else _opened(key, source, past) for key, source in given}


def open_validation(config: Config) -> dict[str, TokenStore]:
    """The validation sources likewise; none of them can be done without."""
    return {source.path: _opened(key, source, Past()) for key, source in _validation(config)}


@dataclass(frozen=True)
class Past:
    """The run, or the one it forks from, after `step`: fingerprints of its sources by path, and those of them that no
    step to come reads. stretches: of the config asked for."""

    run: str = ""
    step: int = 0
    fingerprints: dict[str, str] | None = None
    stretches: tuple[Stretch, ...] = ()

    @classmethod
    def of(cls, config: Config) -> "Past":
        """That of the newest checkpoint in run.dir, else of `run.from`; empty where nothing can be read of it."""
        try:
            run, state = _begun(config)
            then = lay_out(load_config(Path(run) / "config.yaml"))
        except UserError:
            return cls()
        found: dict[str, str] = {}
        for part in state.history.get("stretches", ()):
            for stretch in then:
                if stretch.start <= part["start"] < stretch.end:
                    found |= {source.path: one["fingerprint"] for source, one in
                              zip(stretch.data.train, part["data"]["sources"], strict=False)}
        return cls(run, state.step, found, tuple(lay_out(config)))

    @property
    def absent(self) -> dict[str, str]:
        """path -> fingerprint of what may be absent."""
        return {path: one for path, one in (self.fingerprints or {}).items() if not self.reading(path)}

    def reading(self, path: str) -> list[Stretch]:
        """The stretches to come that read it."""
        return [one for one in self.stretches
                if one.end > self.step and any(source.path == path for source in one.data.train)]

    def ways(self, path: str) -> str:
        """Why the run needs the source at `path`, which is not there."""
        if not self.run:
            return ""
        if reading := self.reading(path):
            first = max(self.step, reading[0].start) + 1
            return f"; {self.run} goes on after step {self.step}, and steps {first}..{reading[-1].end} read it"
        return (f"; {self.run} is past it, but {self.run}/config.yaml has no such path: give the one that stands "
                "there, and no file of it is needed")


def _begun(config: Config) -> tuple[str, RunState]:
    run, origin = config.run.dir, config.run.from_
    newest = checkpoint.newest(Path(run) / "checkpoints")
    if newest is None and origin and origin.state == "all":
        run, newest = origin.path, checkpoint.directory_at(origin.path, origin.step)
    if newest is None:
        raise UserError(f"{run}: no checkpoint there")
    return run, read_run_state(newest)


def _train(config: Config) -> list[tuple[str, SourceConfig]]:
    lists = {one.train_key: one.data.train for one in lay_out(config)}
    return [(f"{key}.{number}", source) for key, given in lists.items() for number, source in enumerate(given)]


def _validation(config: Config) -> list[tuple[str, SourceConfig]]:
    return [(f"data.validation.{number}", source) for number, source in enumerate(config.data.validation)]


def _gone(source: SourceConfig) -> bool:
    return not (bin_path(source.path).is_file() and idx_path(source.path).is_file())


def _opened(key: str, source: SourceConfig, past: Past) -> TokenStore:
    try:
        return TokenStore(source.path)
    except UserError as error:
        raise type(error)(f"{key}.path: {error}{past.ways(source.path) if _gone(source) else ''}") from None
