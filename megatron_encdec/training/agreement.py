"""What all ranks of a launch must have in common, compared before any of them takes a step.

    1. `agree(store, ...)`     every rank makes its plan; where one differs from rank 0's, or fails, all end
    2. `identity(plan, ...)`   what is compared: config, data, tokenizer, code, packages, kind of device
    3. `check_shared(...)`     the run directory is one and the same on all hosts

The messages: rank 0 puts the hash of its identity, and beside it the values, into the store that the ranks have met at.
Every rank compares the hash with its own, counts itself in and waits for the verdict, which the last one gives. A rank
that differs reads the values and gives the verdict itself. So a rank sends a handful of requests of a hundred bytes at
most, and none reads what all others say (docs/cluster.md counts them). It comes before any process group: a rank that
finds no GPU, or whose plan fails, could not form one.
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from textwrap import shorten
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_encdec.engine.checkpoint import versions
from megatron_encdec.platform import schema
from megatron_encdec.platform.code import code_hash
from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.distributed import Control
from megatron_encdec.platform.errors import AgreedError, RunFailed, UserError
from megatron_encdec.platform.optional import CUDA_PACKAGES
from megatron_encdec.platform.ranks import RankEnvironment, host_name
from megatron_encdec.platform.watchdog import LONG
from megatron_encdec.rundir.lineage import changed_keys, history_hash
from megatron_encdec.rundir.lock import Claim
from megatron_encdec.training.plan import Plan
from megatron_encdec.training.sources import sources

T = TypeVar("T")
_SAY_SECONDS = 30.0  # between lines about ranks that are still at their plan
_LEAVE_SECONDS = 10.0  # for the others to read the verdict, where rank 0 takes the store with it
_SHARED_SECONDS = 10.0  # for a new file to be seen by other hosts
_SHOWN = 4  # keys or hosts in a line


def agree(store: dist.Store, environment: RankEnvironment, make: Callable[[], T],
          identity_of: Callable[[T], dict]) -> T:
    """`make()`, on all ranks; collective, over the `store` that they have met at.

    identity_of: of what is made, a tree of plain values. Where a rank's differs from rank 0's, or its `make` raises a
    `UserError`, all ranks raise the same `AgreedError`, which names rank, host, key and both values; where it fails
    otherwise, that rank raises its own error and all others `RunFailed`.
    """
    if environment.world_size == 1:
        return make()
    here = f"rank {environment.rank} on {host_name()}"
    made = mine = problem = failure = None
    try:
        made = make()
        mine = identity_of(made)
    except UserError as error:
        problem = f"{here}: {error}"
    except Exception as error:  # raised below, once the others know
        failure, problem = error, f"{here} failed: {type(error).__name__}: {error}"
    digest = "none" if problem else history_hash(mine)
    if environment.rank == 0:
        store.set("agree/values", json.dumps([here, mine]))
        store.set("agree/hash", digest)
    first = _wait_for(store, "agree/hash", environment)
    if not problem and first not in ("none", digest):
        problem = _difference(here, mine, *json.loads(store.get("agree/values")))
    store.set(f"agree/rank {environment.rank}", "")
    if problem:
        store.compare_set("agree/verdict", "", json.dumps([1 if failure else 2, problem]))
    elif first != "none" and store.add("agree/count", 1) == environment.world_size:
        store.set("agree/verdict", json.dumps([0, ""]))
    code, said = json.loads(_wait_for(store, "agree/verdict", environment))
    if code == 0:
        return made
    _leave(store, environment)
    raise failure or (AgreedError(said) if code == 2 else RunFailed(said))


def _wait_for(store: dist.Store, key: str, environment: RankEnvironment) -> str:
    """The value of `key`, once it is there; meanwhile rank 0 says which ranks it waits for."""
    limit = time.monotonic() + LONG
    while True:
        try:
            store.wait([key], timedelta(seconds=_SAY_SECONDS))
            return store.get(key).decode()
        except dist.DistStoreError:
            if time.monotonic() > limit:
                raise RunFailed(f"the plans of all ranks did not come within {LONG:.0f} s") from None
        if environment.rank == 0:
            late = [rank for rank in range(environment.world_size) if not store.check([f"agree/rank {rank}"])]
            print(f"megatron-encdec: waiting for the plan of rank {', '.join(map(str, late[:_SHOWN]))}"
                  f"{' and others' if len(late) > _SHOWN else ''}", file=sys.stderr, flush=True)


def _difference(here: str, mine: dict, there: str, theirs: dict) -> str:
    changed = changed_keys(theirs, mine)
    lines = [f"{key} is {_shown(now)} instead of {_shown(then)}" for key, (then, now) in list(changed.items())[:_SHOWN]]
    more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return (f"{here} differs from {there}: {'; '.join(lines)}{more}. All ranks need the same config, data, code and "
            "packages")


def _shown(value: object) -> str:
    return shorten(repr(value), 100, placeholder=" ...")


def _leave(store: dist.Store, environment: RankEnvironment) -> None:
    """Rank 0 may hold the store: it goes last, so that everyone can read the verdict."""
    left, limit = store.add("agree/left", 1), time.monotonic() + _LEAVE_SECONDS
    while environment.rank == 0 and left < environment.world_size and time.monotonic() < limit:
        time.sleep(0.02)
        left = store.add("agree/left", 0)


def identity(plan: Plan, until: int | None) -> dict:
    """What identifies the run of `plan` up to step `until` on this rank; fit for JSON."""
    found = dict(plan.train.fingerprints)
    if plan.validation:
        given = [source.path for source in plan.config.data.validation]
        found |= zip(given, plan.validation.fingerprints, strict=True)
    hashes = {key: found[source.path] for key, source in sources(plan.config)}
    hashes |= {"tokenizer.path": plan.tokenizer.fingerprint, "the code of megatron_encdec": code_hash()}
    tree = {**schema.to_dict(plan.config), "--until": until, "device": device_type(), "version of": versions(),
            **{f"the hash of {what}": found[:16] for what, found in hashes.items()}}
    if device_type() == "cuda":
        tree["device"] = torch.cuda.get_device_name()
        tree["version of"] |= {"cuda": torch.version.cuda, **{name: _installed(name) for name in CUDA_PACKAGES}}
    return json.loads(json.dumps(tree))


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def check_shared(claim: Claim, control: Control, directory: str) -> None:
    """Every rank looks for the lock file that rank 0 has just written into the run directory; collective. Raises
    `AgreedError` with the hosts where it is not there: what they would write is lost to the others."""
    unseen = not claim.appears(_SHARED_SECONDS)
    if not control.highest(unseen):
        return
    found = control.gathered((host_name(), unseen))
    hosts = list(dict.fromkeys(host for host, is_unseen in found if is_unseen))
    others = " and others" if len(hosts) > _SHOWN else ""
    raise AgreedError(f"run.dir: {directory} on {', '.join(hosts[:_SHOWN])}{others} is not the folder that rank 0 on "
                      f"{found[0][0]} writes to; it must be on a disk that all hosts share")
