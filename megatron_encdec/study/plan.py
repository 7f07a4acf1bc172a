"""`study plan`: the tree of a study's runs, what it costs one by one and shared, what is done and what is to do.

    1. `plan_study(study)`        recipes -> tree, and the states that are exported and scored (`Point`)
    2. `StudyPlan.as_dict()`      for --json
    3. `StudyPlan.text()`         for people
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_encdec.model.flops import training_flops, whole_pairs
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.progress import short_count
from megatron_encdec.study.config import Resources, StudyConfig
from megatron_encdec.study.curves import short_steps
from megatron_encdec.study.recipes import BASE, Recipe, planned_models
from megatron_encdec.study.tree import Branch, Facts, Tree, grow
from megatron_encdec.training.stretches import by_phase, tokens_between

SHOWN_MISSING = 4


@dataclass(frozen=True, eq=False)
class Point:
    """A state that is exported and scored: after step `step` of `branch`. models: those whose curve it lies on.
    final: whether it is the end of a model, whose name it then has."""

    name: str
    branch: Branch
    step: int
    models: list[str]
    final: bool


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """What a study comes to."""

    study: StudyConfig
    recipes: list[Recipe]
    facts: Facts
    tree: Tree

    @cached_property
    def branches(self) -> list[Branch]:
        """Parents before children."""
        return self.tree.branches

    @cached_property
    def points(self) -> list[Point]:
        """All that is exported: the end of each model and, of each branch once, the steps `checkpoints`."""
        found = []
        for branch in self.branches:
            for step in sorted(set(self.study.checkpoints)):
                local = step - branch.before
                if branch.start < local <= branch.end and not (branch.ending and local == branch.end):
                    found.append(Point(f"{branch.models[0]}@{step}", branch, local, branch.models, False))
            found += [Point(name, branch, branch.end, branch.models, True) for name in branch.ending]
        return found

    @property
    def steps_alone(self) -> int:
        """Steps of all models, each trained by itself."""
        return sum(recipe.steps for recipe in self.recipes)

    @property
    def steps_shared(self) -> int:
        """Steps that are really trained."""
        return sum(branch.steps for branch in self.branches)

    def resources(self, branch: Branch) -> Resources:
        """What it is trained on."""
        return self.study.resources.get(branch.recipe.size or BASE, Resources())

    def gpu_hours(self, branch: Branch) -> float | None:
        """Of all ranks together; None where the size's speed is not known."""
        used = self.resources(branch)
        if used.tokens_per_second is None:
            return None
        return branch.tokens / used.tokens_per_second / 3600 * used.ranks * used.nodes

    def as_dict(self, states: Mapping[str, str]) -> dict[str, Any]:
        """For --json. states: of stretches by their id (`to do` where one is not there). Steps are counted from a
        model's beginning; hours are of GPUs, `null` where no speed is known."""
        alone, shared = self._hours()
        return {"output": self.study.output, "missing": self.facts.missing,
                "steps_alone": self.steps_alone, "steps_shared": self.steps_shared,
                "tokens_alone": sum(branch.tokens * len(branch.models) for branch in self.branches),
                "tokens_shared": sum(branch.tokens for branch in self.branches),
                "gpu_hours_alone": alone, "gpu_hours_shared": shared,
                "models": {recipe.name: self._model(recipe, states) for recipe in self.recipes},
                "stretches": [self._stretch(branch, states) for branch in self.branches],
                "scored": [{"name": point.name, "stretch": point.branch.id,
                            "step": point.step + point.branch.before} for point in self.points]}

    def _model(self, recipe: Recipe, states: Mapping[str, str]) -> dict[str, Any]:
        path = self.tree.path(recipe.name)
        done = all(states.get(branch.id) == "done" for branch in path)
        phases = [{"objective": parts[0].objective.short_name(), "steps": parts[0].phase_steps}
                  for part in filter(None, (recipe.before, recipe)) for parts in by_phase(part.stretches)]
        return {"size": recipe.size, "seed": recipe.seed, "steps": recipe.steps, "phases": phases,
                "tokens": sum(branch.tokens for branch in path), "stretches": [branch.id for branch in path],
                "state": "done" if done else "to do"}

    def _stretch(self, branch: Branch, states: Mapping[str, str]) -> dict[str, Any]:
        start, end = branch.start + branch.before, branch.end + branch.before
        return {"id": branch.id, "parent": branch.parent and branch.parent.id, "start": start, "end": end,
                "steps": branch.steps, "objectives": _objectives(branch),
                "models": branch.models, "ending": branch.ending, "tokens": branch.tokens, "flops": _flops(branch),
                "gpu_hours": self.gpu_hours(branch), "checkpoint_bytes": _checkpoint_bytes(branch),
                "state": states.get(branch.id, "to do")}

    def _hours(self) -> tuple[float | None, float | None]:
        """GPU-hours of all models one by one, and shared."""
        each = [(self.gpu_hours(branch), len(branch.models)) for branch in self.branches]
        if any(hours is None for hours, _ in each):
            return None, None
        return sum(hours * models for hours, models in each), sum(hours for hours, _ in each)

    def text(self, states: Mapping[str, str]) -> str:
        """The tree, a stretch a line with the steps it covers; what it costs; what is kept; what is missing."""
        lines = [f"{self.study.output}: {_count(len(self.recipes), 'model')} in "
                 f"{_count(len(self.branches), 'stretch', 'es')}", ""]
        rows = [(self._place(branch, depth), states.get(branch.id, "to do"), f"{short_count(branch.tokens)} tokens",
                 ", ".join(branch.ending)) for branch, depth in drawn(self.tree)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
                  for row in rows]
        return "\n".join([*lines, "", *self._costs(states), *self._missing()])

    def _place(self, branch: Branch, depth: int) -> str:
        start, end = branch.start + branch.before, branch.end + branch.before
        size = f"{branch.recipe.size} " if branch.parent is None and branch.recipe.size else ""
        words = " ".join(_objectives(branch))
        return f"{'  ' * depth}{size}{words} {start:,}..{end:,}"

    def _costs(self, states: Mapping[str, str]) -> list[str]:
        saved = 1 - self.steps_shared / self.steps_alone
        (alone, shared), kept = self._hours(), self._kept()
        hours = f"; {alone:,.0f} GPU-hours one by one, {shared:,.0f} shared" if shared is not None else ""
        count = Counter(states.get(branch.id, "to do") for branch in self.branches)
        tokens = sum(branch.tokens * len(branch.models) for branch in self.branches)
        return [f"steps        {self.steps_alone:,} one by one, {self.steps_shared:,} shared ({saved:.0%} saved)"
                f"{hours}",
                f"tokens       {short_count(tokens)} one by one, "
                f"{short_count(sum(branch.tokens for branch in self.branches))} shared",
                f"compute      {sum(map(_flops, self.branches)):.3g} FLOP at most, shared",
                f"checkpoints  {_count(len(kept), 'state')} that models end with or branch from, "
                f"{short_count(sum(map(_checkpoint_bytes, kept)))}B if all are kept; a branching point goes when "
                "nothing to do begins there (--keep-all keeps it)",
                f"exports      {_count(len(self.points), 'state')}, "
                f"{'scored' if self.study.finetune else 'not scored (no finetune section)'}",
                "stretches    " + ", ".join(f"{number} {state}" for state, number in count.items())]

    def _kept(self) -> list[Branch]:
        return [branch for branch in self.branches if branch.children or branch.ending]

    def _missing(self) -> list[str]:
        """What is not there: files, and checkpoints to score beyond every model's end."""
        longest = max(recipe.steps for recipe in self.recipes)
        missing = [*self.facts.missing, *(f"checkpoints: {step}: no model has so many steps"
                                          for step in self.study.checkpoints if step > longest)]
        more = [f"missing: and {len(missing) - SHOWN_MISSING} more"] if len(missing) > SHOWN_MISSING else []
        return [f"missing: {line}" for line in missing[:SHOWN_MISSING]] + more


def plan_study(study: StudyConfig) -> StudyPlan:
    """The plan of `study`, on any machine, also where data and tokenizer are not there yet."""
    recipes = planned_models(study)
    facts = Facts.of([one.config for recipe in recipes for one in (recipe.before, recipe) if one])
    plan = StudyPlan(study, recipes, facts, grow(recipes, facts))
    for branch in plan.branches:
        if len(branch.ending) > 1:
            raise UserError(f"models: {' and '.join(branch.ending)} are the same model under several names")
    return plan


def drawn(tree: Tree, trunk_first: bool = False) -> Iterator[tuple[Branch, int]]:
    """Branches in the order of a drawing, each with how many forks it is away from its root. What most models go
    through is the trunk: it goes on at its parent's depth, after the forks or before them."""
    stack = [(root, 0) for root in reversed(tree.roots)]
    while stack:
        branch, depth = stack.pop()
        yield branch, depth
        children = sorted(branch.children, key=lambda one: len(one.models))
        below = [(child, depth + (child is not children[-1])) for child in children]
        stack += below if trunk_first else below[::-1]


def _flops(branch: Branch) -> float:
    """At most: every token labelled, attention over whole windows."""
    total, model = 0.0, branch.recipe.config.model
    for one in branch.stretches:
        tokens = tokens_between([one], branch.start, branch.end)
        pairs = whole_pairs(tokens, one.data.sequence_length, "bidirectional", model.sliding_window)
        total += training_flops(model, tokens, pairs, tokens, one.freeze)
    return total


def _objectives(branch: Branch) -> list[str]:
    """Of its phases, in short."""
    return [parts[0].objective.short_name() for parts in by_phase(branch.stretches)]


def _checkpoint_bytes(branch: Branch) -> int:
    """Weights, two moments and, where the weights are bf16, fp32 masters."""
    config = branch.recipe.config
    return config.model.parameter_count() * (14 if config.precision.dtype == "bf16" else 12)


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}{plural if number != 1 else ''}"


def describe_path(plan: StudyPlan, model: str) -> str:
    """`clm 0..10k → mlm40 10k..42k` of a model."""
    return " → ".join(f"{' '.join(_objectives(branch))} "
                      f"{short_steps(branch.start + branch.before)}..{short_steps(branch.end + branch.before)}"
                      for branch in plan.tree.path(model))
