"""No text holds a special token, whatever kind of tokenizer reads it; what a tokenizer cannot keep is counted."""

import io
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.chunks import Account
from megatron_encdec.text.encode import LossCounter
from megatron_encdec.text.preprocess import preprocess
from megatron_encdec.text.tokenizer import AS_OPTION, load_tokenizer

SPECIAL = ["<pad>", "</s>", "<unk>", "<mask>", "<extra_id_0>"]
WORDS = ["the", "encoder", "reads", "every", "word", "in", "a", "text"]
TEXTS = [" ".join(WORDS), "a mask < hides > one / word [ in ] three _", "mask s pad unk extra id 0 1"]


def hugging_face(model, trainer, **parts):
    """A tokenizer of `model`'s kind trained on our texts, as the content of a tokenizer.json."""
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(TEXTS * 50, trainer)
    return json.loads(made.to_str())


def sentencepiece(**options):
    """A SentencePiece model trained on our texts, as bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50), model_writer=model, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=70, **options)
    return model.getvalue()


def not_special(content):
    """The same, its special tokens added as ordinary ones."""
    for token in content["added_tokens"]:
        token["special"] = False
    return content


def build(kind):
    common = {"special_tokens": SPECIAL, "vocab_size": 80, "show_progress": False}
    blanks, marked = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()
    unigram = trainers.UnigramTrainer(unk_token="<unk>", **common)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind.startswith("sentencepiece"):
        options = {"user_defined_symbols": SPECIAL[3:]} if kind.endswith("user") else {"control_symbols": SPECIAL[3:]}
        return sentencepiece(model_type=kind.split()[1], **options)
    content = {
        "unigram": lambda: hugging_face(models.Unigram(), unigram, pre_tokenizer=marked),
        "unigram, no splitting": lambda: hugging_face(models.Unigram(), unigram),
        "wordpiece on blanks": lambda: hugging_face(models.WordPiece(unk_token="<unk>"),
                                                    trainers.WordPieceTrainer(**common), pre_tokenizer=blanks),
        "wordpiece lower case": lambda: hugging_face(
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**common),
            normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer()),
        "wordlevel": lambda: hugging_face(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**common),
                                          pre_tokenizer=blanks),
        "bpe": lambda: hugging_face(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**common), pre_tokenizer=marked),
        "bpe whole words": lambda: hugging_face(models.BPE(unk_token="<unk>", ignore_merges=True),
                                                trainers.BpeTrainer(**common), pre_tokenizer=blanks),
        "byte-level": lambda: hugging_face(
            models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **common | {"vocab_size": 300}),
            pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    }[kind.removesuffix(", not special")]()
    return json.dumps(not_special(content) if kind.endswith("not special") else content).encode()


KINDS = ["unigram", "unigram, no splitting", "wordpiece on blanks", "wordpiece lower case", "wordlevel", "bpe",
         "bpe whole words", "byte-level", "unigram, not special", "bpe, not special", "byte-level, not special",
         "sentencepiece bpe user", "sentencepiece unigram user", "sentencepiece unigram control"]
CLOSED = {"wordlevel"}  # a vocabulary of whole words: what is not in it is unknown, a special token's name too


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """kind -> path of a tokenizer."""
    root, paths = tmp_path_factory.mktemp("zoo"), {}
    for number, kind in enumerate(KINDS):
        paths[kind] = root / f"{number}.{'model' if 'sentencepiece' in kind else 'json'}"
        paths[kind].write_bytes(build(kind))
    return paths


spelling = st.sampled_from([*SPECIAL, *(name.upper() for name in SPECIAL), *(name[:-1] for name in SPECIAL)])
pieces = st.one_of(spelling, st.sampled_from(WORDS), st.sampled_from([" ", "  ", "\n", ""]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_a_special_token(zoo, kind):
    tokenizer = load_tokenizer(zoo[kind])
    special = set(tokenizer.special_ids) - {tokenizer.unknown_id}
    assert [tokenizer.token(id_) for id_ in (tokenizer.eod_id, tokenizer.mask_id, tokenizer.pad_id)] == [
        "</s>", "<mask>", "<pad>"]

    @given(st.lists(pieces, max_size=12).map("".join))
    @settings(max_examples=60, deadline=None)
    def check(text):
        assert not special & set(tokenizer.encode(text))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_encodes_as_it_does_alone(zoo, kind):
    """Words on both sides of a special token's name have the ids that they have without it."""
    tokenizer = load_tokenizer(zoo[kind])
    for name in SPECIAL:
        text = f"the encoder {name} reads every word"
        ids, alone = tokenizer.encode(text), [tokenizer.encode(part) for part in ("the encoder", " reads every word")]
        assert ids[: len(alone[0])] == alone[0]
        tails = [alone[1], tokenizer.encode("reads every word")]  # the blank before a first word is some models' rule
        assert any(ids[-len(tail):] == tail for tail in tails)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_no_special_token_in_it_is_encoded_as_the_library_does(zoo, kind):
    tokenizer, text = load_tokenizer(zoo[kind]), "the encoder reads every word in a text"
    if "sentencepiece" in kind:
        import sentencepiece

        theirs = sentencepiece.SentencePieceProcessor(model_file=str(zoo[kind])).encode(text)
    else:
        theirs = tokenizers.Tokenizer.from_file(str(zoo[kind])).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_through_preprocess_every_text_is_there_and_what_is_lost_is_counted(zoo, kind, tmp_path):
    texts = [f"the {name} reads {name}" for name in SPECIAL] + ["every word"]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    manifest = preprocess([tmp_path / "docs.jsonl"], zoo[kind], tmp_path / "out", workers=1, progress=False)
    tokenizer, data = load_tokenizer(zoo[kind]), TokenStore(tmp_path / "out")
    tokens_S, ends_D = data.read(0, data.tokens), data.document_ends(0, data.tokens)
    assert (manifest.documents, tokens_S[ends_D - 1].tolist()) == (6, [tokenizer.eod_id] * 6)
    inside = np.delete(tokens_S, ends_D - 1).tolist()
    assert not {tokenizer.eod_id, tokenizer.mask_id, tokenizer.pad_id} & set(inside)
    assert manifest.unknown_tokens == inside.count(tokenizer.unknown_id)
    if kind in CLOSED:
        assert manifest.special_tokens_in_text == 8  # all names but that of the unknown token itself
    if kind.startswith("byte-level"):
        assert (manifest.special_tokens_in_text, manifest.unknown_tokens, manifest.dropped_characters) == (0, 0, 0)


def test_dropout_is_for_training_a_tokenizer(zoo, tmp_path):
    content = json.loads(zoo["bpe"].read_bytes())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    plain, noisy = load_tokenizer(zoo["bpe"]), load_tokenizer(tmp_path)
    assert all(noisy.encode(text) == plain.encode(text) for text in TEXTS * 5)
    assert noisy.fingerprint == plain.fingerprint


def test_an_ordinary_token_that_is_named_as_padding_stays_in_texts(zoo, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(zoo["byte-level"].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "e"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id in tokenizer.special_ids and tokenizer.token(tokenizer.pad_id) == "e"
    assert tokenizer.encode("e") == [tokenizer.pad_id]
    assert tokenizer.fingerprint == load_tokenizer(zoo["byte-level"]).fingerprint


def without_unknown(zoo, tmp_path, kind, **changes):
    content = json.loads(zoo[kind].read_bytes())
    content["model"] |= changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


def test_characters_that_a_vocabulary_leaves_out_are_counted(zoo, tmp_path):
    tokenizer, losses = without_unknown(zoo, tmp_path, "bpe", unk_token=None), Account()
    LossCounter(tokenizer).add(losses, ["東京 word".encode(), b"word", "é".encode()], np.array([], np.uint32))
    assert losses == Account(dropped_characters=3)
    (tmp_path / "docs.jsonl").write_text('{"text": "東京 word"}\n{"text": "word"}\n')
    manifest = preprocess([tmp_path / "docs.jsonl"], tmp_path, tmp_path / "out", workers=1, progress=False)
    assert (manifest.documents, manifest.dropped_characters, manifest.unknown_tokens) == (2, 2, 0)


def test_an_unknown_token_that_ends_documents_is_not_used(zoo, tmp_path):
    tokenizer = without_unknown(zoo, tmp_path, "bpe", unk_token="</s>")
    assert (tokenizer.unknown_id, [tokenizer.token(id_) for id_ in tokenizer.encode("東")]) == (None, ["▁"])
    with pytest.raises(UserError, match="'</s>' is the end of document and the unknown token too.*--eod-token"):
        content = json.loads(zoo["wordlevel"].read_bytes())
        content["model"]["unk_token"] = "</s>"
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        load_tokenizer(tmp_path, setting=AS_OPTION)


@pytest.mark.parametrize("length", [1, 900_000])
def test_a_text_that_has_no_tokens_is_counted(zoo, tmp_path, length):
    """A Unigram model without unknown token raises at a character that it does not know: that document is skipped, a
    very long one, which is encoded in pieces, as a whole."""
    without_unknown(zoo, tmp_path, "unigram", unk_id=None)
    (tmp_path / "docs.jsonl").write_text(f'{{"text": "東京 {"word " * length}"}}\n{{"text": "word"}}\n')
    manifest = preprocess([tmp_path / "docs.jsonl"], tmp_path, tmp_path / "out", workers=1, progress=False)
    assert manifest.documents == 1
    assert {reason: one.count for reason, one in manifest.skipped.items()} == {"no_tokens": 1}
