"""Studies of the small run of `small_run.py`: their files, and what they are compared by."""

import json
from pathlib import Path

import yaml
from small_run import final_bits, metrics, run_cli

from megatron_encdec.engine.integrity import saved_names, step_of
from megatron_encdec.platform import schema
from megatron_encdec.study.config import load_study
from megatron_encdec.study.plan import plan_study


def write_study(root: Path, directory: Path, models: list[str], **keys) -> Path:
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump({"base": str(root / "config.yaml"), "output": "out", "models": models} | keys))
    return path


def states(study: Path) -> dict[str, str]:
    """Of each stretch, as `study plan --json` says."""
    said = json.loads(run_cli("study", "plan", study, "--json").stdout)
    return {one["id"]: one["state"] for one in said["stretches"]}


def check_against_models_alone(study: Path) -> None:
    """Final weights, optimizer state, and metrics of all steps, of each model trained by itself: in `alone/NAME`."""
    loaded = load_study(study)
    plan = plan_study(loaded)
    (study.parent / "alone").mkdir(exist_ok=True)
    for recipe in plan.recipes:
        alone = study.parent / "alone" / recipe.name
        path, lines = plan.tree.path(recipe.name), []
        phases = json.dumps(schema.to_dict(recipe.config.phases))
        run_cli("pretrain", loaded.base, f"run.dir={alone}", f"phases={phases}")
        for branch in path:
            lines += metrics(study.parent / "out/stretches" / branch.id)
        assert lines == metrics(alone), recipe.name
        last = study.parent / "out/stretches" / path[-1].id
        assert final_bits(last, path[-1].end) == final_bits(alone, recipe.steps), recipe.name


class NothingTwice:
    """Looks on while drivers and jobs are killed. A line of metrics has the times of its step: where it is still there,
    the step was not trained again."""

    def __init__(self, study: Path):
        self._stretches = study.parent / "out/stretches"
        self._saved: dict[Path, list[bytes]] = {}  # lines up to the newest checkpoint there ever was
        self._kept: dict[Path, list[bytes]] = {}

    def killed(self, with_jobs: bool) -> None:
        """A driver was: what there is has to stay, without its jobs all of it, with them what was saved."""
        self.check()
        for run in self._stretches.glob("*"):
            lines = self._lines(run)
            newest = max(map(step_of, saved_names(run / "checkpoints")), default=0)
            saved = [line for line in lines if json.loads(line)["step"] <= newest]
            self._saved[run] = max(self._saved.get(run, []), saved, key=len)
            self._kept[run] = self._saved[run] if with_jobs else lines

    def check(self) -> None:
        for run, lines in self._kept.items():
            assert self._lines(run)[:len(lines)] == lines, f"{run}: steps were trained again"

    def _lines(self, run: Path) -> list[bytes]:
        path = run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [line for line in lines if b'"kind": "train"' in line]
