"""Batches of like length, and tokens that are made once: the same texts, the same losses, less padding."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest
from finetune_sets import losses, run_of, run_one
from transformers import AutoTokenizer

from megatron_encdec.finetune.batches import like_lengths, padding_of
from megatron_encdec.finetune.features import load_task
from megatron_encdec.finetune.token_cache import FOLDER, TokenCache


def test_each_text_once_little_padding_and_no_batch_too_large():
    draw = random.Random(0)
    lengths = [draw.choice((5, 9, 40, 200, 2000)) + draw.randrange(5) for _ in range(500)]
    batches = like_lengths(lengths, 32, 1024, cost=64)
    assert sorted(number for batch in batches for number in batch) == list(range(500))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) <= 32 and (len(batch) == 1 or len(batch) * longest <= 1024)
    as_drawn = [list(range(begin, min(begin + 32, 500))) for begin in range(0, 500, 32)]
    assert padding_of(lengths, batches) < 0.01 * sum(lengths) < 2 * sum(lengths) < padding_of(lengths, as_drawn)


def test_a_batch_is_not_split_for_less_than_it_costs():
    assert like_lengths([10, 12, 11], 8, cost=64) == [[1, 2, 0]]
    assert like_lengths([10, 100, 10], 8, cost=64) == [[1], [0, 2]]
    assert like_lengths([], 8) == [] and like_lengths([7], 8, 4) == [[0]]


@pytest.mark.nemo
@pytest.mark.parametrize("family", ["SC", "TC", "QA", "IR"])
def test_losses_and_scores_are_those_of_one_padded_batch(root, family, monkeypatch):
    """Lengths from 7 to 13 tokens, in one micro-batch, and in one for each length."""
    from megatron_encdec.finetune import batches

    results = []
    for name, cost in (("together", 10**9), ("apart", 0)):
        monkeypatch.setattr(batches, "BATCH_COST", {"cpu": cost, "cuda": cost})
        run = run_of(root, family, name, steps=6, micro_batch_size=16, retrieval_micro_batch_size=8,
                     shared=family == "IR")
        results.append((run_one(run), losses(run)))
    (scores, together), (others, apart) = results
    assert apart == pytest.approx(together, rel=1e-4) and apart != together
    assert others["test"]["score"] == pytest.approx(scores["test"]["score"], abs=0.07)


@pytest.mark.parametrize("family", ["SC", "TC", "QA", "IR"])
def test_tokens_are_made_once_for_all_runs_of_a_tree(root, family, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    run = run_of(root, family, f"tokens_{family}")
    first = load_task(run)
    expected = [first.train, first.features("test")]
    files = sorted((root / f"tokens_{family}" / FOLDER).iterdir())
    assert files and all(file.suffix == ".npz" for file in files)
    load_task(run_of(root, family, "elsewhere"))  # and so the first one is to be made again
    load_task(run_of(root, family, "elsewhere_too"))
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)
    again = load_task(run)
    assert again is not first and [again.train, again.features("test")] == expected
    other = dataclasses.replace(run, training=dataclasses.replace(run.training, max_length=20))
    assert load_task(other).train == first.train  # what is cut is cut afterwards


def test_what_is_damaged_or_of_another_prefix_is_made_anew(root):
    run = run_of(root, "IR", "damaged")
    expected = load_task(run).train
    folder = root / "damaged" / FOLDER
    for file in folder.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    next(folder.iterdir()).write_bytes(b"")  # as after a power cut
    files = set(folder.iterdir())
    for name in ("elsewhere", "elsewhere_too"):
        load_task(run_of(root, "IR", name))
    assert load_task(run).train == expected and set(folder.iterdir()) == files
    prefixed = run_of(root, "IR", "damaged", query_prefix="river ")
    assert load_task(prefixed).train != expected and set(folder.iterdir()) > files


@pytest.mark.parametrize("place", [4, 6, 8])
def test_whatever_is_flipped_in_a_kept_file(root, tmp_path, place):
    """In the header of its first array: zipfile takes it for another version, a password, another method."""
    tokenizer = AutoTokenizer.from_pretrained(root / "euro")
    expected = TokenCache(tokenizer, tmp_path)(["river stone"], True)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[place] ^= 0xFF
    content[directory + place + 2] ^= 0xFF
    file.write_bytes(content)
    assert TokenCache(tokenizer, tmp_path)(["river stone"], True) == expected


def test_a_tokenizer_that_splits_special_tokens_has_files_of_its_own(root, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(root / "euro")
    text = [f"river {tokenizer.pad_token}"]
    plain = TokenCache(tokenizer, tmp_path)(text, False)
    tokenizer.split_special_tokens = True
    split = TokenCache(tokenizer, tmp_path)(text, False)
    assert split["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"] != plain["input_ids"]


def test_files_that_nobody_read_for_long_are_removed(root, tmp_path):
    cache = TokenCache(AutoTokenizer.from_pretrained(root / "euro"), tmp_path)
    for text in ("river", "stone"):
        cache([text], True)
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    cache(["river"], True)
    assert len(list(tmp_path.iterdir())) == 2
    cache(["cloud"], True)
    assert len(list(tmp_path.iterdir())) == 2 and all(file.stat().st_mtime > 0 for file in tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_harm(root, tmp_path):
    (tmp_path / "file").write_text("")
    found = TokenCache(AutoTokenizer.from_pretrained(root / "euro"), tmp_path / "file")(["river"], True)
    assert found["input_ids"][0]


WRITER = """
import itertools, pathlib, sys
import tokenizers
from megatron_encdec.finetune.token_cache import TokenCache

class Fast:
    backend_tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")

    def __call__(self, texts, **_):
        return {"input_ids": [one.ids for one in self.backend_tokenizer.encode_batch(texts)]}

cache = TokenCache(Fast(), pathlib.Path(sys.argv[2]))
for number in itertools.count():
    rows = [f"text {number % 7}", *["river stone cloud"] * 1000]
    assert cache(rows, True)["input_ids"] == Fast()(rows)["input_ids"]
    print(number, flush=True)
"""


def test_a_kill_leaves_files_that_are_whole(root, tmp_path):
    """Two writers, of which one is killed while it writes: the other goes on, and what is there can be read."""
    words = [sys.executable, "-c", WRITER, str(root / "euro"), str(tmp_path / FOLDER)]
    writers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for writer, until in zip(writers, ("0", "15"), strict=True):
        assert until in (line.strip() for line in writer.stdout)
        writer.kill()
        writer.communicate()
    assert len(list((tmp_path / FOLDER).glob("*.npz"))) == 7
