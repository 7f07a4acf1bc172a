"""The mask: own, reserved or added; its row; the tokenizer that comes with it."""

import json

import pytest
import sentencepiece
import torch
import transformers
from random_models import save
from safetensors.torch import load_file, save_file

from megatron_encdec.interop.export import export
from megatron_encdec.interop.importing import Wish, import_model
from megatron_encdec.interop.mask_token import choose_mask
from megatron_encdec.interop.source import find, whole_trunk
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import load_tokenizer


@pytest.fixture
def without(tokenizer_directory, tmp_path):
    """The tokenizer without a mask: its mask token is called otherwise, and no token is reserved unless asked."""
    def make(reserved: bool):
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        text = (tokenizer_directory / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>")
        if not reserved:
            text = text.replace("<|reserved_", "<|thing_")
        (directory / "tokenizer.json").write_text(text)
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>",
                                                                     "pad_token": "<|pad|>"}))
        return directory
    return make


def imported(tmp_path, tokenizer, change=None, name="llama2", **wish):
    model = save(name, tmp_path / "hf", tokenizer)
    if change:
        file = tmp_path / "hf" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    import_model(tmp_path / "hf", tmp_path / "run", Wish(**wish), say=lambda _line: None)
    return model, find(str(tmp_path / "run"))


def rows(tmp_path, as_):
    export(str(tmp_path / "run"), tmp_path / as_, as_, say=lambda _line: None)
    found = load_file(tmp_path / as_ / "model.safetensors")
    return found["model.embed_tokens.weight"], found["lm_head.weight"]


def test_the_tokenizers_own(topology, tokenizer_directory, tmp_path):
    model, source = imported(tmp_path, tokenizer_directory)
    assert source.imported["mask"] == {"kind": "own", "id": 1}
    assert torch.equal(rows(tmp_path, "eurobert")[0], model.model.embed_tokens.weight)


def test_a_reserved_one_keeps_its_row(topology, without, tmp_path):
    model, source = imported(tmp_path, without(reserved=True))
    mask = source.imported["mask"]
    assert mask["kind"] == "reserved" and source.tokenizer.token(mask["id"]) == "<|reserved_0|>"
    assert torch.equal(rows(tmp_path, "eurobert")[0], model.model.embed_tokens.weight)
    original, copy = (tmp_path / part / "tokenizer.json" for part in ("tokenizer", "run/tokenizer"))
    assert original.read_bytes() == copy.read_bytes()  # data written with either is data of both


def test_a_reserved_one_that_was_never_trained_gets_the_mean_and_goes_back_untouched(topology, without, tmp_path):
    def forget(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name][3] = 1e-20

    _, source = imported(tmp_path, without(reserved=True), forget)
    assert source.imported["mask"] == {"kind": "reserved", "id": 3}
    known = source.tokenizer.vocabulary_size
    before = load_file(tmp_path / "hf" / "model.safetensors")
    for table, name in zip(rows(tmp_path, "eurobert"), ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        torch.testing.assert_close(table[3], before[name][:known].mean(dim=0), atol=1e-6, rtol=1e-5)
    for table, name in zip(rows(tmp_path, "llama"), ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert torch.equal(table, before[name])


@pytest.mark.parametrize("spare", [True, False])
def test_one_is_added(topology, without, tmp_path, spare):
    """`spare`: the embedding has rows that no token uses, as many released models'; else it grows by one."""
    directory = without(reserved=False)
    size = load_tokenizer(directory).vocabulary_size
    save("llama2", tmp_path / "hf", directory, vocab_size=size + 5 if spare else size)
    import_model(tmp_path / "hf", tmp_path / "run", say=lambda _line: None)
    source = find(str(tmp_path / "run"))
    assert source.imported["mask"] == {"kind": "added", "id": size}
    assert source.config.model.vocabulary_size == (size + 5 if spare else size + 1)
    before = load_file(tmp_path / "hf" / "model.safetensors")
    embedding, head = rows(tmp_path, "eurobert")
    assert len(embedding) == source.config.model.vocabulary_size
    for table, name in ((embedding, "model.embed_tokens.weight"), (head, "lm_head.weight")):
        torch.testing.assert_close(table[size], before[name][:size].mean(dim=0), atol=1e-6, rtol=1e-5)
        assert torch.equal(table[:size], before[name][:size])
    assert torch.equal(rows(tmp_path, "llama")[0], before["model.embed_tokens.weight"])  # the way back has none

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "eurobert")
    assert (loaded.mask_token, loaded.mask_token_id) == ("<|mask|>", size)
    ids = loaded("the <|mask|> word")["input_ids"]
    assert ids == [*source.tokenizer.encode("the"), size, *source.tokenizer.encode(" word")]


def test_one_that_is_added_to_a_modernbert_has_the_mean_in_its_bias_too(topology, without, tmp_path):
    directory = without(reserved=False)
    size = load_tokenizer(directory).vocabulary_size
    save("modernbert-decoder", tmp_path / "hf", directory, vocab_size=size)
    import_model(tmp_path / "hf", tmp_path / "run", say=lambda _line: None)
    assert find(str(tmp_path / "run")).imported["mask"] == {"kind": "added", "id": size}
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), {}
    for as_ in ("modernbert", "modernbert-decoder"):
        export(str(tmp_path / "run"), tmp_path / as_, as_, say=lambda _line: None)
        after[as_] = load_file(tmp_path / as_ / "model.safetensors")
    for name in ("model.embeddings.tok_embeddings.weight", "decoder.bias"):
        found = after["modernbert"][name]
        torch.testing.assert_close(found[size], before[name].mean(dim=0), atol=1e-6, rtol=1e-5)
        assert torch.equal(found[:size], before[name]) and torch.equal(after["modernbert-decoder"][name], before[name])


def test_a_bias_goes_the_way_of_the_embeddings(topology, without, tmp_path):
    """A reserved token's bias may be anything: whether its row was trained is for the embeddings to say."""
    tables = ("model.embeddings.tok_embeddings.weight", "decoder.bias")

    def forget(tensors):
        tensors[tables[0]][3] = 1e-20
        tensors[tables[1]][3] = 5.0

    _, source = imported(tmp_path, without(reserved=True), forget, "modernbert")
    known, before = source.tokenizer.vocabulary_size, load_file(tmp_path / "hf" / "model.safetensors")
    with whole_trunk(source) as trunk:
        assert trunk.output_layer.bias[3].item() == pytest.approx(before[tables[1]][:known].mean().item(), rel=1e-5)
    export(str(tmp_path / "run"), tmp_path / "back", say=lambda _line: None)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in tables)


def test_a_named_one_and_none(topology, without, tmp_path):
    directory = without(reserved=True)
    _, source = imported(tmp_path, directory, mask="<|reserved_3|>")
    assert source.tokenizer.token(source.imported["mask"]["id"]) == "<|reserved_3|>"
    with pytest.raises(UserError, match="has no token '<|reserved_77|>'"):
        choose_mask(load_tokenizer(directory), "<|reserved_77|>")
    assert choose_mask(load_tokenizer(directory), "none").kind == "none"


def test_a_sentencepiece_model_gets_one_more_piece_and_fits_its_data_as_before(topology, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the encoder reads every word", "a mask hides one word in three"] * 20),
        model_prefix=str(tmp_path / "tokenizer" / "tokenizer"), model_type="bpe", vocab_size=80,
        hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "tokenizer" / "tokenizer.vocab").unlink()
    size = load_tokenizer(tmp_path / "tokenizer").vocabulary_size
    _, source = imported(tmp_path, tmp_path / "tokenizer")
    assert source.imported["mask"] == {"kind": "added", "id": size}
    assert sorted(file.name for file in (tmp_path / "run" / "tokenizer").iterdir()) == [
        "tokenizer.model", "tokenizer_config.json"]
    before, after = load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(tmp_path / "run" / "tokenizer")
    assert (after.token(size), after.fingerprint) == ("<|mask|>", before.fingerprint)
    assert after.encode("a <|mask|> hides") == before.encode("a <|mask|> hides")
    assert [file.name for file in (tmp_path / "run" / "source").glob("token*")] == ["tokenizer.model"]
