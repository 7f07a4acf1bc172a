"""A run directory as a Python object: what `inspect run` tells, to work with; `load_run` gives it."""

from pathlib import Path
from typing import Any

from megatron_encdec.engine.integrity import saved_names, step_of
from megatron_encdec.inspection.run import describe, in_words, of_kind, read_run
from megatron_encdec.training.config import Config


class LoadedRun:
    """What a run has done up to now; read anew from its files by each new object. Printed, it is the table of
    `megatron-encdec inspect run`.

    directory: run.dir. config: the resolved `Config`. step, planned_steps, tokens, targets: as far as it has come.
    phases: a dict each, with `name`, `objective`, `steps`, `first_loss`, `last_loss`, `validation_loss`, .... Losses
    are in nats a label. parent: the run it was forked from or began with the weights of, None without one. failure: how
    its last launch failed (`step`, `reason`, `when`), None where it did not.
    """

    def __init__(self, directory: str):
        """Raises `UserError` where no step of a run is recorded in `directory`."""
        self.directory = Path(directory)
        self.config: Config
        self.config, self._records = read_run(directory)
        report = describe(directory, self.config, self._records, with_entropy=False)
        self.step: int = report["step"]
        self.planned_steps: int = report["planned_steps"]
        self.tokens: int = report["tokens"]
        self.targets: int = report["targets"]
        self.phases: list[dict[str, Any]] = report["phases"]
        self.parent: dict[str, Any] | None = report["parent"]
        self.failure: dict[str, Any] | None = report["failure"]

    @property
    def finished(self) -> bool:
        """Whether the last step of the config is done."""
        return self.step >= self.planned_steps

    @property
    def checkpoints(self) -> list[int]:
        """The steps whose checkpoints are there, ascending."""
        return [step_of(name) for name in saved_names(self.directory / "checkpoints")]

    def metrics(self, kind: str = "train") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind: `train`, `eval`, `phase`, `checkpoint` or `resume`. As a table:
        `pandas.DataFrame(run.metrics())`."""
        return of_kind(kind, self._records)

    def __str__(self) -> str:
        return in_words({**describe(str(self.directory), self.config, self._records, with_entropy=True), "models": []})

    def __repr__(self) -> str:
        return f"<run {self.directory}: step {self.step:,} of {self.planned_steps:,}>"
