"""Tiny random models of many architectures: a step through NeMo's recipes, saved, loaded by others, the same logits."""

import os
import shutil

import numpy as np
import pytest
import torch
from finetune_sets import run_of, write_model

from megatron_encdec.finetune.config import ModelSource
from megatron_encdec.finetune.models import build_model, check_attention, positions_of
from megatron_encdec.platform.errors import UserError

pytestmark = pytest.mark.nemo

SIZES = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64, pad_token_id=2, bos_token_id=None, eos_token_id=0)
GROUPS = {"num_key_value_heads": 1, "tie_word_embeddings": True}
# name -> (class that is saved, what its config says besides the sizes)
DECODERS = {
    "llama": ("LlamaForCausalLM", {"mlp_bias": True, "head_dim": 24}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral_sliding": ("MistralForCausalLM", {"sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16,
                                     "layer_types": ["sliding_attention", "full_attention"]}),
    "modernbert_decoder": ("ModernBertDecoderForCausalLM", {"bos_token_id": 3, "cls_token_id": 3, "sep_token_id": 4,
                                                            "local_attention": 8}),
}
ENCODERS = {
    "embeddinggemma": ("Gemma3ForCausalLM", {
        "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True}),
    "eurobert": ("EuroBertForMaskedLM", {"mask_token_id": 1}),
    "modernbert": ("ModernBertForMaskedLM", {"cls_token_id": 3, "sep_token_id": 4, "local_attention": 8}),
    "bert": ("BertModel", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),  # without a pooler
    "xlm_roberta": ("XLMRobertaModel", {}),
    "deberta_v3": ("DebertaV2Model", {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
                                      "norm_rel_ebd": "layer_norm", "share_att_key": True,
                                      "position_biased_input": False, "type_vocab_size": 0}),
}
STOCK = {"eurobert", "modernbert"}  # pool by mean themselves


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a directory of every architecture, all with the same tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("architectures")
    tokenizer = write_model(folder / "tokenizer")
    for name, (model_class, settings) in (DECODERS | ENCODERS).items():
        model_class = getattr(transformers, model_class)
        torch.manual_seed(0)
        sizes = {**SIZES, **(GROUPS if name in DECODERS and name != "modernbert_decoder" else {}), **settings}
        model_class(model_class.config_class(**sizes)).save_pretrained(folder / name)
        for file in tokenizer.glob("token*"):
            shutil.copyfile(file, folder / name / file.name)
    return folder


def reloaded(directory, family, batch):
    """Logits of the saved model, by transformers where it is a stock class, else by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        if os.path.exists(directory / "modules.json"):
            model = SentenceTransformer(str(directory), device="cpu").eval()
            return model(inputs)["sentence_embedding" if family == "SC" else "token_embeddings"]
        auto = AutoModelForSequenceClassification if family == "SC" else AutoModelForTokenClassification
        return auto.from_pretrained(directory).eval()(**inputs).logits


def step_and_reload(models, name, family="SC", **settings):
    """One step of `name`; whether it was saved as a stock class. Asserts that it gives the same logits then."""
    from megatron_encdec.finetune.run import make_recipe

    run = run_of(models, family, model=name, steps=1, settings=settings, save_model=True)
    recipe = make_recipe(run)
    recipe.run_train_validation_loop()
    batch = recipe.task.collate(recipe.task.features("test")[:5])
    with torch.no_grad():
        trained = recipe.encoder.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    directory = run.directory / "model"
    allowed = batch["attention_mask"].bool() if family != "SC" else slice(None)
    torch.testing.assert_close(reloaded(directory, family, batch)[allowed], trained[allowed], atol=1e-5, rtol=0)
    return not os.path.exists(directory / "modules.json")


@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_classification_by_the_mean(models, name):
    assert step_and_reload(models, name) == (name in STOCK)


@pytest.mark.parametrize(("name", "pooling", "stock"), [
    ("llama", "last", True), ("gemma3", "last", True), ("qwen3", "cls", False), ("bert", "cls", True),
    ("roberta", "cls", True), ("eurobert", "cls", True), ("modernbert", "last", False)])
def test_other_pooling(models, name, pooling, stock):
    assert step_and_reload(models, name, pooling=pooling) == stock


@pytest.mark.parametrize("family", ["TC", "QA"])
@pytest.mark.parametrize(("name", "stock"), [("qwen3", True), ("bert", True), ("gemma3", False)])
def test_tokens(models, family, name, stock):
    assert step_and_reload(models, name, family) == stock


@pytest.mark.slow
@pytest.mark.parametrize("family", ["TC", "QA", "IR"])
@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_every_architecture_in_every_family(models, name, family):
    """The table of docs/finetune.md: a step, scores, saved, loaded by others, the same outputs."""
    if family == "IR":
        retrieve_and_reload(models, name)
    else:
        assert step_and_reload(models, name, family) == (name not in ("gemma3", "embeddinggemma", "modernbert_decoder"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_the_probe(models, name, implementation):
    """Every model is bidirectional; a decoder is causal where asked to be, and no other model can be."""
    if (name, implementation) == ("deberta_v3", "sdpa"):
        pytest.skip("transformers has eager attention alone for it")
    both, causal = (ModelSource(str(models / name), attention=attention) for attention in ("bidirectional", "causal"))
    model = build_model(both, "IR")
    model.set_attn_implementation(implementation)
    if (name, implementation) == ("modernbert_decoder", "eager"):
        with pytest.raises(UserError, match="ModernBertDecoderModel fails under it with eager attention"):
            check_attention(model, both)
        return
    check_attention(model, both)
    with pytest.raises(UserError, match=f"attention: causal is asked for, but .*is bidirectional .*{implementation}"):
        check_attention(model, causal)
    if name in DECODERS:
        model = build_model(causal, "IR")
        model.set_attn_implementation(implementation)
        check_attention(model, causal)


def test_a_run_that_sees_otherwise_than_asked_is_refused_before_training(models):
    from megatron_encdec.finetune.run import make_recipe

    with pytest.raises(UserError, match="attention: causal is asked for, but BertModel is bidirectional"):
        make_recipe(run_of(models, "SC", model="bert", settings={"attention": "causal"}))


def retrieve_and_reload(models, name, **settings):
    """One step of a retriever; the model as sentence-transformers loads it, whose queries are embedded alike."""
    from sentence_transformers import SentenceTransformer

    from megatron_encdec.finetune.run import make_recipe

    run = run_of(models, "IR", model=name, steps=1, settings=settings, save_model=True)
    recipe = make_recipe(run)
    recipe.run_train_validation_loop()
    model = SentenceTransformer(str(run.directory / "model"), device="cpu")
    queries = [example.query for example in recipe.task.examples.test]
    found = model.encode(queries, prompt_name="query", normalize_embeddings=True, convert_to_tensor=True)
    expected = torch.tensor(np.stack(recipe.outputs("test")[: len(queries)]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    return run, model


def test_a_retriever_with_its_own_pooling_and_prefixes(models):
    settings = {"pooling": "last", "query_prefix": "river ", "document_prefix": "", "attention": "causal"}
    run, model = retrieve_and_reload(models, "smollm3", **settings)
    assert run.model.label == "smollm3-causal-last"
    assert model.prompts == {"query": "river ", "document": ""}


def test_positions_behind_the_padding(models):
    assert positions_of(ModelSource(str(models / "roberta"))) == 61 == positions_of(
        ModelSource(str(models / "xlm_roberta")))
    assert positions_of(ModelSource(str(models / "bert"))) == 64
