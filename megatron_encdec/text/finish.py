"""The last step of preprocessing and merging: finished files get their names; a crash in between costs nothing.

    1. `publish(folder, prefixes, written)`   records the manifests in the folder, then renames, manifests last
    2. `left_to_publish(folder, prefixes)`    after a crash: the recorded manifests, if all files are there

Each step leaves what an earlier attempt has done as it is, so that the same call finishes it. Never does a manifest
stand beside files of another run, nor an old validation split beside new training data.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build, to_dict
from megatron_encdec.rundir.files import fsync_directory, write_json_atomic
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.indexed import bin_path, bring_out, idx_path
from megatron_encdec.text.manifest import Manifest

RECORD = "finished.json"


def publish(folder: Path, prefixes: Mapping[str, Path], written: Mapping[str, Manifest]) -> None:
    """Bring out the files NAME.bin and NAME.idx of the folder, all on disk already, for each name in `prefixes`."""
    write_json_atomic(folder / RECORD, {name: to_dict(manifest) for name, manifest in written.items()})
    waiting = [prefix for name, prefix in prefixes.items() if (folder / f"{name}.bin").exists()]
    for path in [path(prefix) for path in (manifests.manifest_path, idx_path) for prefix in waiting]:
        path.unlink(missing_ok=True)
        fsync_directory(path.parent)
    for name, prefix in prefixes.items():
        bring_out(folder, name, prefix)
    for name in reversed(list(prefixes)):
        manifests.write(prefixes[name], written[name])


def left_to_publish(folder: Path, prefixes: Mapping[str, Path]) -> dict[str, Manifest] | None:
    """What an interrupted `publish` has left to be called with; None where there is nothing, or files are missing."""
    try:
        content = json.loads((folder / RECORD).read_bytes())
        written = {name: build(Manifest, content[name]) for name in prefixes}
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    for name, prefix in prefixes.items():
        for path, size in ((bin_path, written[name].bin_bytes), (idx_path, written[name].idx_bytes)):
            here = path(folder / name)
            there = here if here.exists() else path(prefix)
            if not there.exists() or there.stat().st_size != size:
                return None
    return written
