"""A run knows its tokenizer by what it does: saved again, or with a token more, it goes on; earlier records hold."""

import hashlib
import json
import shutil
import struct

import pytest
import transformers
from small_run import final_bits, metrics

from megatron_encdec.engine.integrity import checksums_text
from megatron_encdec.rundir.files import sha256_file
from megatron_encdec.rundir.lineage import history_hash
from megatron_encdec.text.tokenizer import load_tokenizer
from megatron_encdec.training.config import load_config
from megatron_encdec.training.layout import lay_out


def saved_again(root, directory):
    """The tokenizer as transformers saves it, with a chat template and a special token more."""
    loaded = transformers.AutoTokenizer.from_pretrained(root / "tokenizer")
    loaded.chat_template = "{{ messages }}"
    loaded.add_special_tokens({"additional_special_tokens": ["<|chat|>"]})
    loaded.save_pretrained(directory)
    return directory


def test_a_run_goes_on_with_its_tokenizer_saved_again(here, root, tmp_path):
    whole = here("whole", "model.vocabulary_size=302").run
    run = here("run", "model.vocabulary_size=302", "--until", "8").run
    other = saved_again(root, tmp_path / "other")
    here("run", "model.vocabulary_size=302", f"tokenizer.path={other}")
    assert metrics(run) == metrics(whole)
    assert final_bits(run, 12) == final_bits(whole, 12)


def test_another_mask_and_other_ordinary_tokens_are_another_history(here, root, tmp_path):
    here("run", "--until", "8")
    refused = here("run", "tokenizer.mask_token=<|reserved_3|>", code=2).err
    assert "objective.mask_id: 1 -> 6" in refused
    content = json.loads((root / "tokenizer/tokenizer.json").read_text())
    word = max(content["model"]["vocab"], key=content["model"]["vocab"].get)  # now a special token: never masked
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": word})
    shutil.copytree(root / "tokenizer", tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(content))
    refused = here("run", f"tokenizer.path={tmp_path / 'other'}", code=2).err
    assert "does not give the ids that" in refused  # texts cannot hold that word's token any more


def as_earlier_versions_had_it(history: dict, run, masking: dict) -> dict:
    """The history of a checkpoint in the form of before stretches: its parts beside each other, `masking` apart, one
    hash for the learning rates of all steps."""
    stretches, rates = history["stretches"], hashlib.sha256()
    laid_out = lay_out(load_config(run / "config.yaml"))
    for step in range(1, history["step"] + 1):
        rate = next(one for one in laid_out if step <= one.end).learning_rate(step)
        rates.update(struct.pack("<d", rate))
    unset = dict.fromkeys(("mask_ratio", "mask_fraction", "random_fraction"))
    phases = [{"start": one["start"], "end": one["end"], "optimizer_state": one["optimizer_state"],
               "objective": unset | {key: value for key, value in one["objective"].items()
                                     if key not in ("mask_id", "ordinary_ids")},
               "masking": masking if "mask_id" in one["objective"] else None} for one in stretches]
    return {**{key: history[key] for key in ("step", "run_seed", "model")}, "learning_rates": rates.hexdigest(),
            **{key: stretches[0][key] for key in ("data", "batch_global_size", "optimizer", "precision")},
            "phases": phases}


@pytest.mark.parametrize("masks_by", ["ordinary_ids", "tokenizer"])
def test_a_checkpoint_of_an_earlier_version_is_continued(here, unbroken, root, masks_by):
    """Without stretches; still earlier, with the sha256 of the tokenizer's file in the place of the ordinary ids."""
    run = here("run", "--until", "8").run
    file = run / "checkpoints/step_00000008/run_state.json"
    state, tokenizer = json.loads(file.read_text()), load_tokenizer(root / "tokenizer")
    assert state["tokenizer_fingerprint"] == tokenizer.fingerprint
    masking = {"mask_id": 1, masks_by: state["history"]["stretches"][1]["objective"]["ordinary_ids"]}
    if masks_by == "tokenizer":
        masking["tokenizer"] = state["tokenizer_fingerprint"] = tokenizer.file_sha256
    state["history"] = as_earlier_versions_had_it(state["history"], run, masking)
    state["history_hash"] = history_hash(state["history"])
    file.write_text(json.dumps(state))
    sums = file.with_name("checksums.json")
    files = {name: (one["bytes"], one["sha256"]) for name, one in json.loads(sums.read_text())["files"].items()}
    files[file.name] = (file.stat().st_size, sha256_file(file))
    sums.write_text(checksums_text(files))
    assert "schedule.warmup_steps: 2 -> 3" in here("run", "schedule.warmup_steps=3", code=2).err
    here("run")
    assert metrics(run) == metrics(unbroken)
    assert final_bits(run, 12) == final_bits(unbroken, 12)

