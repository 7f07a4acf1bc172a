"""AutoTokenizer on the written files encodes as preprocessing did, and knows mask, end and padding."""

import json

import pytest
import sentencepiece
import tokenizers
import transformers

from megatron_encdec.interop.tokenizer_files import check_tokenizer, special_ids, write_tokenizer
from megatron_encdec.text.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["the encoder reads every word", "a mask hides one word in three", "naïve café — 東京",
         "x = f(y)\n"] * 20


def written(tokenizer, directory):
    directory.mkdir()
    remarks = write_tokenizer(tokenizer, directory, 128)
    loaded = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return loaded, remarks


def test_our_own_tokenizer_is_copied_byte_for_byte(tmp_path):
    tokenizer = train_tokenizer(iter(TEXTS), 300, tmp_path / "own")
    loaded, remarks = written(tokenizer, tmp_path / "out")
    assert remarks == []
    source, copy = (tmp_path / name / "tokenizer.json" for name in ("own", "out"))
    assert copy.read_bytes() == source.read_bytes()
    assert (loaded.mask_token, loaded.eos_token, loaded.pad_token) == ("<|mask|>", "<|endoftext|>", "<|pad|>")
    assert loaded.model_max_length == 128
    assert "token_type_ids" not in loaded("the word")
    ids = loaded("the <|mask|> word")["input_ids"]
    assert ids.count(tokenizer.mask_id) == 1
    assert ids == [*tokenizer.encode("the"), tokenizer.mask_id, *tokenizer.encode(" word")]


def test_a_reserved_token_as_mask_takes_the_blank_before_it(tmp_path):
    train_tokenizer(iter(TEXTS), 300, tmp_path / "own")
    tokenizer = load_tokenizer(tmp_path / "own", mask_token="<|reserved_3|>")
    loaded, _ = written(tokenizer, tmp_path / "out")
    assert loaded.mask_token == "<|reserved_3|>"
    ids = loaded("the <|reserved_3|> word")["input_ids"]
    assert ids == [*tokenizer.encode("the"), tokenizer.mask_id, *tokenizer.encode(" word")]


def test_a_word_piece_tokenizer_with_an_unused_entry_as_mask(tmp_path):
    vocabulary = {token: i for i, token in enumerate(
        ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s", ",", "x"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    model.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "[CLS]"}}))
    tokenizer = load_tokenizer(tmp_path, mask_token="[unused1]", eod_token="[SEP]")
    loaded, remarks = written(tokenizer, tmp_path / "out")
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 4, 0)
    assert loaded("hello [unused1] world", add_special_tokens=False)["input_ids"] == [5, 1, 6]
    assert special_ids(tokenizer)["bos"] == loaded.bos_token_id == 3
    assert len(remarks) == 1 and "[CLS]" in remarks[0] and "[SEP]" in remarks[0]


def test_a_difference_is_told(tmp_path):
    tokenizer = train_tokenizer(iter(TEXTS), 300, tmp_path / "own")
    other = train_tokenizer(iter(["quite other words"] * 20), 270, tmp_path / "other")
    written(other, tmp_path / "out")
    assert check_tokenizer(tokenizer, tmp_path / "out") is not None
    assert check_tokenizer(other, tmp_path / "out") is None


SPACES = {"collapsed": {}, "kept": {"byte_fallback": True, "normalization_rule_name": "identity",
                                    "remove_extra_whitespaces": False}}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("settings", SPACES.values(), ids=SPACES)
def test_sentencepiece_becomes_a_tokenizer_json(tmp_path, kind, settings):
    prefix = str(tmp_path / "model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, model_type=kind, control_symbols=["<mask>"],
        vocab_size=380 if "byte_fallback" in settings else 80, hard_vocab_limit=False, minloglevel=2,
        **settings)
    tokenizer = load_tokenizer(prefix + ".model")
    loaded, remarks = written(tokenizer, tmp_path / "out")
    assert remarks == []
    assert (loaded.mask_token_id, loaded.eos_token_id) == (tokenizer.mask_id, tokenizer.eod_id)
    for text in TEXTS[:4]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text)
    ids = loaded("every <mask> word")["input_ids"]
    assert ids == [*tokenizer.encode("every"), tokenizer.mask_id, *tokenizer.encode("word")]


def test_a_sentencepiece_model_that_cannot_be_converted_is_copied(tmp_path):
    prefix = str(tmp_path / "model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, model_type="word", vocab_size=60,
        hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "out").mkdir()
    remarks = write_tokenizer(load_tokenizer(prefix + ".model"), tmp_path / "out", 128)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.model"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "model.model").read_bytes()
    assert len(remarks) == 1 and "cannot reproduce" in remarks[0]
