import json
import os
import subprocess
import sys

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.objectives.base import Vocabulary
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import load_tokenizer, require_mask, train_tokenizer


def edited_copy(tokenizer_dir, destination, replace=None, config=None, **fields):
    """A copy of the tokenizer with names replaced in its text, top-level fields and its config set."""
    destination.mkdir()
    text = (tokenizer_dir / "tokenizer.json").read_text()
    for old, new in (replace or {}).items():
        text = text.replace(old, new)
    (destination / "tokenizer.json").write_text(json.dumps(json.loads(text) | fields))
    if config is not None:
        (destination / "tokenizer_config.json").write_text(json.dumps(config))
    return destination


def test_trained_tokenizer_has_its_special_tokens_first(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    assert (tokenizer.eod_id, tokenizer.mask_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.special_ids == list(range(8))
    assert tokenizer.vocabulary_size == 300
    assert [tokenizer.token(i) for i in (1, 7, 300)] == ["<|mask|>", "<|reserved_4|>", None]


@given(st.text())
@settings(deadline=None)
def test_decode_gives_the_text_back(tokenizer_dir, text):
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids
    assert not set(ids) & set(tokenizer.special_ids)


def test_special_tokens_in_text_stay_text(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    text = "a <|mask|> and <|endoftext|>"
    assert not {0, 1} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def added(content, id_, name, special):
    """The added tokens with one more."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"added_tokens": [*content["added_tokens"], {"id": id_, "content": name, "special": special, **flags}]}


def merges_as_text(content):
    """As files of older versions have them."""
    return {"model": content["model"] | {"merges": [" ".join(pair) for pair in content["model"]["merges"]]}}


@pytest.mark.parametrize("change", [
    lambda content: {"padding": None, "decoder": None},
    lambda content: {"post_processor": {"type": "BertProcessing", "sep": ["<|endoftext|>", 0], "cls": ["<|mask|>", 1]}},
    lambda content: {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    lambda content: added(content, 300, "<|chat|>", special=True),
    lambda content: {"model": {key: value for key, value in content["model"].items() if value is not False}},
    merges_as_text])
def test_what_changes_no_texts_ids_leaves_the_fingerprint(tokenizer_dir, tmp_path, change):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    here, there = load_tokenizer(tokenizer_dir), load_tokenizer(
        edited_copy(tokenizer_dir, tmp_path / "other", **change(content)))
    assert (there.fingerprint, there.encode("the encoder")) == (here.fingerprint, here.encode("the encoder"))
    assert there.file_sha256 != here.file_sha256


@pytest.mark.parametrize("change", [
    lambda content: {"normalizer": {"type": "Lowercase"}},
    lambda content: {"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}},
    lambda content: {"model": content["model"] | {"merges": content["model"]["merges"][:-1]}},
    lambda content: {"model": content["model"] | {"ignore_merges": True}},
    lambda content: added(content, 300, "encoder", special=False)])
def test_what_may_change_a_texts_ids_changes_the_fingerprint(tokenizer_dir, tmp_path, change):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    other = edited_copy(tokenizer_dir, tmp_path / "other", **change(content))
    assert load_tokenizer(other).fingerprint != load_tokenizer(tokenizer_dir).fingerprint


def test_the_end_of_document_is_part_of_the_fingerprint_and_the_mask_is_not(tokenizer_dir):
    plain = load_tokenizer(tokenizer_dir)
    assert load_tokenizer(tokenizer_dir, eod_token="<|pad|>").fingerprint != plain.fingerprint
    other = load_tokenizer(tokenizer_dir, mask_token="<|reserved_3|>")
    assert other.fingerprint == plain.fingerprint
    assert Vocabulary.of(other).ordinary_ids.tolist() == Vocabulary.of(plain).ordinary_ids.tolist()


def test_saved_again_by_transformers_it_is_the_same_tokenizer(tokenizer_dir, tmp_path):
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    loaded.chat_template = "{{ messages }}"
    loaded.add_special_tokens({"additional_special_tokens": ["<|chat|>"]})
    loaded.save_pretrained(tmp_path)
    here, there = load_tokenizer(tokenizer_dir), load_tokenizer(tmp_path)
    assert there.vocabulary_size == here.vocabulary_size + 1
    assert there.has_fingerprint(here.fingerprint) and not there.has_fingerprint(here.file_sha256)
    assert here.has_fingerprint(here.file_sha256)  # as manifests of earlier versions have it
    assert Vocabulary.of(there).identity == Vocabulary.of(here).identity  # so that a run's history stays what it was


def test_stored_truncation_padding_and_framing_do_not_touch_documents(tokenizer_dir, tmp_path):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
               "pad_type_id": 0, "pad_token": "<|pad|>"}
    framing = {"type": "BertProcessing", "sep": ["<|endoftext|>", 0], "cls": ["<|mask|>", 1]}
    path = edited_copy(tokenizer_dir, tmp_path / "limited", truncation=truncation, padding=padding,
                       post_processor=framing)
    for text in ("x", "a text of more than four tokens"):
        assert load_tokenizer(path).encode(text) == load_tokenizer(tokenizer_dir).encode(text)


def test_mask_is_named_or_the_tokenizers_own(tokenizer_dir, tmp_path):
    assert load_tokenizer(tokenizer_dir, mask_token="<|reserved_3|>").mask_id == 6
    by_name = edited_copy(tokenizer_dir, tmp_path / "by_name", {"<|mask|>": "[MASK]"})
    assert load_tokenizer(by_name).mask_id == 1
    by_config = edited_copy(tokenizer_dir, tmp_path / "by_config", {"<|mask|>": "<hide>"},
                            {"mask_token": {"content": "<hide>"}})
    assert load_tokenizer(by_config).mask_id == 1


def test_without_a_mask_the_reserved_tokens_are_proposed(tokenizer_dir, tmp_path):
    path = edited_copy(tokenizer_dir, tmp_path / "no_mask", {"<|mask|>": "<|x|>"})
    tokenizer = load_tokenizer(path)
    assert tokenizer.mask_id is None
    with pytest.raises(UserError, match=r"no mask token in .*no_mask.*\.mask_token.*<\|reserved_0\|>"):
        require_mask(tokenizer)
    assert require_mask(load_tokenizer(path, mask_token="<|reserved_0|>")) == 3


def test_end_of_document_is_named_or_the_tokenizers_own(tokenizer_dir, tmp_path):
    assert load_tokenizer(tokenizer_dir, eod_token="<|pad|>").eod_id == 2
    by_config = edited_copy(tokenizer_dir, tmp_path / "by_config", {"<|endoftext|>": "<stop>"},
                            {"eos_token": "<stop>"})
    assert load_tokenizer(by_config).eod_id == 0
    unknown = edited_copy(tokenizer_dir, tmp_path / "unknown", {"<|endoftext|>": "<stop>"})
    with pytest.raises(UserError, match=r"no end-of-document token.*tokenizer\.eod_token"):
        load_tokenizer(unknown)


def test_wrong_names_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match=r"mask_token: .* has no token '<\|maks\|>' .*<\|mask\|>"):
        load_tokenizer(tokenizer_dir, mask_token="<|maks|>")
    with pytest.raises(UserError, match=r"'<\|endoftext\|>' is both the mask and the end of document"):
        load_tokenizer(tokenizer_dir, mask_token="<|endoftext|>")
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic_and_refuses_tiny_sizes(tmp_path):
    script = ("import sys; from megatron_encdec.text.tokenizer import train_tokenizer\n"
              "words = [f'word{i * 7919 % 1000} {i * 31 % 17}' for i in range(3000)]\n"
              "train_tokenizer(iter(words), 600, sys.argv[1])")
    for name, threads in (("a", "1"), ("b", "2")):  # another hash seed and another number of threads
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True,
                       env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads})
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="263 entries are too few: 264"):
        train_tokenizer(iter(["x"]), 263, tmp_path / "small")


def test_transformers_loads_it_with_the_mask(tokenizer_dir):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tokenizer_dir), load_tokenizer(tokenizer_dir)
    assert (theirs.mask_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 0, 2)
    text = "the encoder reads every word — 東京"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs("the <|mask|> reads")["input_ids"] == [*ours.encode("the"), 1, *ours.encode(" reads")]


def test_fill_mask_pipeline_runs_on_it(tokenizer_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    config = transformers.EuroBertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=2, bos_token_id=0, eos_token_id=0, mask_token_id=1)
    model = transformers.EuroBertForMaskedLM(config)
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    answers = fill("the <|mask|> reads every word", top_k=3)
    assert len(answers) == 3
    assert answers[0]["sequence"].endswith(" reads every word")


def test_sentencepiece_model(tmp_path):
    path = tmp_path / "sp.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the encoder reads every word", "a mask hides a word"] * 50),
            model_writer=file, vocab_size=25, control_symbols=["<unused0>"], minloglevel=2)
    tokenizer = load_tokenizer(path, mask_token="<unused0>")
    assert (tokenizer.token(tokenizer.mask_id), tokenizer.token(tokenizer.eod_id)) == ("<unused0>", "</s>")
    assert tokenizer.vocabulary_size == 25
    ids = tokenizer.encode("every mask reads")
    assert tokenizer.decode(ids) == "every mask reads"
    assert not set(ids) & {tokenizer.eod_id, tokenizer.mask_id}
    assert {0, 1, 2, tokenizer.mask_id} <= set(tokenizer.special_ids)
    with pytest.raises(UserError, match="mask_token"):
        require_mask(load_tokenizer(path, eod_token="<unused0>"))
