"""Long documents have the ids of the whole; gigatoken is used only where it gives the tokenizer's ids."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import encoder
from megatron_encdec.text.encoder import GIGATOKEN, TOKENIZERS, Encoder, choose_encoder, encode_long
from megatron_encdec.text.tokenizer import load_tokenizer

WORDS = ["mask", "encoder", "Reading", "it's", "naïve", "x=1,", "2048", "(so", "on).", "café", "東京", "end.\n",
         "\n\nNew", "  indented", "😀", "e\u0301t", "\tTab", "long-winded", "a", "of"]
SPECIAL = ["<|endoftext|>", "[UNK]", "[MASK]"]


def words(count, seed=1):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def save(model, trainer, folder, **parts):
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([words(2000, seed) for seed in range(5)], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))


def sentencepiece_model(path, **settings):
    model = io.BytesIO()
    sentences = (line for seed in range(20) for line in words(200, seed).split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, vocab_size=400,
                                             minloglevel=2, byte_fallback=True, hard_vocab_limit=False, **settings)
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def zoo(tokenizer_dir, tmp_path_factory):
    """Tokenizers of each kind by name."""
    root = tmp_path_factory.mktemp("zoo")
    special = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 400}
    save(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**special), root / "wordpiece",
         normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer())
    save(models.Unigram(), trainers.UnigramTrainer(unk_token="[UNK]", **special), root / "unigram",
         pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    save(models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**special), root / "metaspace",
         pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    sentencepiece_model(root / "bpe.model", model_type="bpe")
    sentencepiece_model(root / "unigram.model", model_type="unigram", normalization_rule_name="identity",
                        remove_extra_whitespaces=False)
    names = ("wordpiece", "unigram", "metaspace", "bpe.model", "unigram.model")
    return {"byte-level": load_tokenizer(tokenizer_dir)} | {name: load_tokenizer(root / name) for name in names}


KINDS = ("byte-level", "wordpiece", "unigram", "metaspace", "bpe.model", "unigram.model")


def in_parts(tokenizer, pieces):
    """(ids, unproven cuts, parts) of a document that comes in `pieces`."""
    parts = list(encode_long(iter(pieces), lambda text: np.array(tokenizer.encode(text), np.uint32)))
    return np.concatenate([ids for ids, _ in parts]).tolist(), sum(not proven for _, proven in parts), len(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_document_have_the_ids_of_the_whole(zoo, kind, monkeypatch):
    monkeypatch.setattr(encoder, "LONG_CHARACTERS", 1000)
    monkeypatch.setattr(encoder, "WINDOW", 200)
    for seed in range(20):
        text = words(random.Random(seed).randint(200, 2000), seed)
        whole = zoo[kind].encode(text)
        cuts = sorted(random.Random(seed).sample(range(len(text)), 5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids, unproven, parts = in_parts(zoo[kind], pieces)
        assert (ids == whole, unproven) == (True, 0)
        assert parts >= -(-len(text) // 1000)
        assert in_parts(zoo[kind], [text]) == (ids, unproven, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(zoo, kind):
    text = words(300_000)
    assert len(text) > encoder.LONG_CHARACTERS * 3 // 2
    assert in_parts(zoo[kind], [text])[:2] == (zoo[kind].encode(text), 0)


@pytest.mark.parametrize("text", ["東京と大阪" * 1000, "x" * 5000, "é" * 3000, "x" * 1200 + " y" * 4 + "z" * 1200,
                                  "👩‍👩‍👧" * 800, "\n" * 4000 + "x", "a\u0301" * 2000])
def test_cuts_without_proof_are_counted_and_keep_the_text(zoo, text, monkeypatch):
    monkeypatch.setattr(encoder, "LONG_CHARACTERS", 1000)
    monkeypatch.setattr(encoder, "WINDOW", 200)
    ids, unproven, parts = in_parts(zoo["byte-level"], [text])
    assert zoo["byte-level"].decode(ids) == text
    assert 0 < unproven <= parts - 1


# ---------------------------------------------------------------------------------------------------- which encoder
@pytest.fixture
def variant(tokenizer_dir, tmp_path):
    """A function: change the content of our tokenizer.json, and load it."""
    def make(change):
        content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path)
    return make


def test_gigatoken_is_chosen_where_it_is_right(zoo):
    choice, why = choose_encoder(zoo["byte-level"], [words(50)])
    assert choice.name == GIGATOKEN and why.startswith("same ids as the tokenizer on a sample of")
    assert choice.compared_documents > 1
    assert choice.compared_characters > len(words(50))
    assert choose_encoder(zoo["byte-level"], [], TOKENIZERS)[0].name == TOKENIZERS


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "metaspace", "unigram.model"])
def test_what_gigatoken_cannot_do_is_said(zoo, kind):
    choice, reason = choose_encoder(zoo[kind], [])
    assert choice.name == TOKENIZERS
    assert "cannot load" in reason or "differ" in reason
    with pytest.raises(UserError, match="--encoder gigatoken: .*; use --encoder tokenizers"):
        choose_encoder(zoo[kind], [], GIGATOKEN)


def test_a_difference_is_found_by_the_probes_alone(variant):

    def join_words(content):
        content["pre_tokenizer"]["use_regex"] = False
        content["model"]["vocab"]["ĠĠ"] = 300  # two blanks in a row, which the usual words never hold
        content["model"]["merges"].append(["Ġ", "Ġ"])

    other = variant(join_words)
    assert "differ" in choose_encoder(other, [])[1]

    def add(content, **token):
        names = {"id": 300, "content": "encoder", "single_word": True, "lstrip": True, "rstrip": False,
                 "normalized": True, "special": False}
        content["added_tokens"].append(names | token)

    other = variant(add)
    assert other.encode("my encoders") != other.model.for_gigatoken().encode(b"my encoders").tolist()
    assert "differ" in choose_encoder(other, [])[1]


def test_a_difference_is_found_in_the_users_own_text(variant):
    """A normalizer that touches a character that is in no probe."""
    other = variant(lambda content: content.update(normalizer=None))
    known = other.model.encode_batch
    other.model.encode_batch = lambda texts: known([text.replace("\u0d05", "") for text in texts])
    assert choose_encoder(other, ["nothing strange"])[0].name == GIGATOKEN
    assert "differ" in choose_encoder(other, ["nothing strange", "in Malayalam അ"])[1]


def test_a_difference_while_working_ends_the_run(zoo):
    fast = Encoder(zoo["byte-level"], GIGATOKEN)
    fast._tokenizer = zoo["wordpiece"]
    with pytest.raises(UserError, match="disagree on a document that starts 'mask.*--encoder tokenizers"):
        fast.encode([b"mask encoder"])


def test_both_encoders_give_the_same_arrays_and_special_tokens_stay_text(zoo):
    tokenizer = zoo["byte-level"]
    texts = [words(30, seed) for seed in range(50)] + ["<|endoftext|>", "a <|mask|> b", "", "\x00", "x" * 20_000]
    results = [Encoder(tokenizer, name).encode([text.encode() for text in texts]) for name in (GIGATOKEN, TOKENIZERS)]
    for ids, lengths in results:
        assert ids.tolist() == sum(map(tokenizer.encode, texts), [])
        assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
        assert not {0, 1, 2} & set(ids.tolist())


def test_gigatokens_cache_is_started_anew(zoo, monkeypatch):
    fast = Encoder(zoo["byte-level"], GIGATOKEN)
    first = fast._fast
    fast.encode([b"a word"])
    assert fast._fast is first
    fast._full = 0
    ids, _ = fast.encode([b"a word"])
    assert fast._fast is not first
    assert ids.tolist() == zoo["byte-level"].encode("a word")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_starts_a_word_is_the_one_after_a_blank(zoo, kind):
    """Seen from outside: a word's first token, behind another word, starts one, and no other token of it does."""
    tokenizer = zoo[kind]
    for word in ("encoder", "reading", "longwinded", "of"):
        first, *rest = tokenizer.encode(f"mask {word}")[len(tokenizer.encode("mask")):]
        assert first in tokenizer.word_start_ids and not set(rest) & tokenizer.word_start_ids


def test_a_tokenizer_that_marks_no_words_says_so(tmp_path):
    special = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 400}
    save(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"),
         trainers.BpeTrainer(end_of_word_suffix="</w>", **special), tmp_path / "suffix",
         pre_tokenizer=pre_tokenizers.Whitespace())
    save(models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**special), tmp_path / "plain",
         pre_tokenizer=pre_tokenizers.Whitespace())
    sentencepiece_model(tmp_path / "behind.model", model_type="bpe", treat_whitespace_as_suffix=True)
    for name in ("suffix", "plain", "behind.model"):
        assert load_tokenizer(tmp_path / name).word_start_ids is None, name
