"""The tree of runs: what several models have in common is one branch, trained once.

Models share a step where their histories up to it are equal (training/stretches.py), whatever is different later.

    1. `grow(recipes, facts)`      recipes -> `Tree`: branches, and where each model's path through them ends
    2. `Branch.hash_at(step)`      the history hash of a state on it, by which checkpoints are found
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_encdec.data.store import TokenStore
from megatron_encdec.objectives.base import Vocabulary
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.lineage import history_hash
from megatron_encdec.study.curves import short_steps
from megatron_encdec.study.recipes import Recipe
from megatron_encdec.training.config import Config
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.plan import ASSUMED_VOCABULARY, beginning, missing_inputs, resolve
from megatron_encdec.training.sources import sources
from megatron_encdec.training.stretches import Stretch, Timeline, by_phase, tokens_between


@dataclass(frozen=True)
class Facts:
    """What data and tokenizer of the base say. missing: a line for each file that is not there yet; the rest are then
    stand-ins, which tell histories apart as well but are no checkpoint's."""

    fingerprints: dict[str, str]  # of sources, by path
    vocabulary: Vocabulary
    vocabulary_size: int
    missing: list[str]

    @classmethod
    def of(cls, configs: Sequence[Config]) -> "Facts":
        """Those of the recipes' configs, which have the same tokenizer."""
        first, missing = configs[0], list(dict.fromkeys(line for one in configs for line in missing_inputs(one)))
        paths = {source.path for one in configs for _, source in sources(one)}
        if missing:
            size = first.model.vocabulary_size or ASSUMED_VOCABULARY
            return cls({path: path for path in paths}, Vocabulary(size, mask_id=0), size, missing)
        plan = resolve(first)
        known = dict(plan.timeline.fingerprints)
        known |= {path: TokenStore(path).fingerprint for path in paths - known.keys()}
        return cls(known, plan.vocabulary, plan.config.model.vocabulary_size, [])


@dataclass(eq=False)
class Path:
    """A recipe with its timeline. pieces: first and last step, identity and learning rates of each of its stretches."""

    recipe: Recipe
    timeline: Timeline

    @cached_property
    def pieces(self) -> list[tuple[int, int, str, np.ndarray]]:
        """Compared to find out what two paths share."""
        return [(one.start, one.end, json.dumps(identity, sort_keys=True), one.learning_rates)
                for one, identity in zip(self.timeline.stretches, self.timeline.identities, strict=True)]


@dataclass(eq=False)
class Branch:
    """Steps start + 1 .. end, trained once for all `models`; those in `ending` end with it.

    leading: the path of the first of its models, whose config it is trained with. before: steps of a run whose weights
    this one's began with (`cpt.samples: restart`); start and end count from there.
    """

    leading: Path
    start: int
    end: int
    parent: "Branch | None" = None
    before: int = 0
    children: list["Branch"] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    ending: list[str] = field(default_factory=list)
    _hashes: dict[int, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many."""
        return self.end - self.start

    @property
    def recipe(self) -> Recipe:
        """That it is trained with."""
        return self.leading.recipe

    @cached_property
    def id(self) -> str:
        """Its folder: size and objectives up to its end, and what tells it from all others."""
        done = [one for one in self.leading.timeline.stretches if one.start < self.end]
        stages = [f"{parts[0].objective.short_name()}-{short_steps(min(parts[-1].end, self.end) + self.before)}"
                  for parts in by_phase(done)]
        return f"{'-'.join(filter(None, [self.recipe.size, *stages]))}_{self.hash_at(self.end)[:8]}"

    def hash_at(self, step: int) -> str:
        """The history hash of the state after `step`."""
        if step not in self._hashes:
            self._hashes[step] = history_hash(self.leading.timeline.history(step))
        return self._hashes[step]

    @property
    def stretches(self) -> list[Stretch]:
        """What of the timeline it covers; first and last may reach beyond it."""
        return [one for one in self.leading.timeline.stretches if one.start < self.end and one.end > self.start]

    @property
    def tokens(self) -> int:
        """Input tokens."""
        return tokens_between(self.stretches, self.start, self.end)


@dataclass
class Tree:
    """All branches, parents first; and each model's last one."""

    roots: list[Branch] = field(default_factory=list)
    last: dict[str, Branch] = field(default_factory=dict)

    @property
    def branches(self) -> list[Branch]:
        """Parents before their children, and a branch's first subtree before its second."""
        found, stack = [], self.roots[::-1]
        while stack:
            found.append(stack.pop())
            stack += found[-1].children[::-1]
        return found

    def path(self, model: str) -> list[Branch]:
        """The branches that a model goes through, from the first."""
        return list(_up(self.last[model]))[::-1]


def _up(branch: Branch | None) -> Iterator[Branch]:
    while branch is not None:
        yield branch
        branch = branch.parent


def grow(recipes: Sequence[Recipe], facts: Facts) -> Tree:
    """The tree of all recipes."""
    tree = Tree()
    for recipe in recipes:
        _add(tree, recipe, facts, [recipe.name])
    return tree


def _add(tree: Tree, recipe: Recipe, facts: Facts, names: list[str]) -> Branch:
    """Lead `names` along the recipe's path, making branches where it leaves all others; the branch it ends with."""
    parent, first = None, _first_state(recipe)
    if recipe.before:
        parent = _add(tree, recipe.before, facts, [])
        for branch in _up(parent):
            branch.models += names
        first = {"weights": {"step": parent.end, "history_hash": parent.hash_at(parent.end)}}
    model = replace(recipe.config.model, vocabulary_size=recipe.config.model.vocabulary_size or facts.vocabulary_size)
    recipe = replace(recipe, config=replace(recipe.config, model=model))
    path = Path(recipe, Timeline(lay_out(recipe.config), first, model.identity(), facts.fingerprints,
                                 facts.vocabulary))
    before, at = (parent.before + parent.end if parent else 0), 0
    while at < path.timeline.total_steps:
        siblings = parent.children if parent else tree.roots
        shared, branch = max(((_common(one.leading, path, at), one) for one in siblings), key=lambda pair: pair[0],
                             default=(0, None))
        if shared <= at:
            branch = Branch(path, at, path.timeline.total_steps, parent, before)
            siblings.append(branch)
        elif shared < branch.end:
            _split(branch, shared, tree)
        branch.models += names
        parent, at = branch, branch.end
    parent.ending += names
    tree.last |= dict.fromkeys(names, parent)
    return parent


def _first_state(recipe: Recipe) -> dict:
    """What its state at step 0 follows from; a stand-in where the run that it begins with is not there yet."""
    origin = recipe.config.run.from_
    if origin is None or recipe.before:
        return {"run_seed": recipe.seed}
    try:
        return beginning(recipe.config)
    except UserError:
        return {"weights": {"step": origin.step, "history_hash": origin.path}}


def _split(branch: Branch, step: int, tree: Tree) -> None:
    """Cut `branch` after `step`: the rest of it becomes its one child."""
    rest = Branch(branch.leading, step, branch.end, branch, branch.before, branch.children, list(branch.models),
                  branch.ending)
    for child in rest.children:
        child.parent = rest
    tree.last |= dict.fromkeys(rest.ending, rest)
    branch.end, branch.children, branch.ending = step, [rest], []


def _common(one: Path, other: Path, at: int) -> int:
    """The last step up to which the histories are equal, `at` or later: up to there they are known to be."""
    a, b = one.timeline, other.timeline
    if at == 0 and (a.beginning, a.model) != (b.beginning, b.model):
        return 0
    shared = at
    for (start, end, identity, rates), (*theirs, other_rates) in zip(one.pieces, other.pieces, strict=False):
        both = min(end, theirs[1])
        if max(end, theirs[1]) <= at:
            continue
        if both <= shared or [start, identity] != [theirs[0], theirs[2]]:
            break
        if rates[shared - start] != other_rates[shared - start]:  # mostly seen here, without a look at all the others
            break
        different = np.flatnonzero(rates[shared - start:both - start] != other_rates[shared - start:both - start])
        if different.size:
            return shared + int(different[0])
        shared = both
    return shared
