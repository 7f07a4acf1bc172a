"""What is frozen, as words, and what a trunk refuses."""

import pytest

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.flops import training_flops
from megatron_encdec.model.parts import Frozen
from megatron_encdec.platform.errors import UserError


@pytest.mark.parametrize(("given", "words"), [
    ([], []), (["head", "layers 3", "embeddings", "layers 0-1", "layers 2"], ["embeddings", "layers 0-3", "head"]),
    (["layers 5", "layers 0-2", "layers 1-3"], ["layers 0-3", "layers 5"])])
def test_words(given, words):
    assert Frozen.parse(given).words == words
    assert Frozen.parse(words) == Frozen.parse(given) and bool(words) == bool(Frozen.parse(given))


@pytest.mark.parametrize("word", ["layers", "layer 3", "layers 3-1", "layers -1", "norms", "layers 1-",
                                  "layers 123456"])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=f"'{word}' is not one of embeddings, head, layers A-B, layers N"):
        Frozen.parse(["head", word])


@pytest.mark.parametrize(("words", "tied", "error"), [
    (["layers 2-8"], False, "there is no layer 8; the trunk has the layers 0-7"),
    (["head"], True, "head: model.tied_embeddings makes the head the embeddings' table; give embeddings"),
    (["embeddings", "layers 0-7"], True, "embeddings, layers 0-7 is the whole trunk"),
    (["embeddings", "layers 0-7", "head"], False, ".* is the whole trunk, nothing is left to train"),
])
def test_what_a_trunk_refuses(words, tied, error):
    with pytest.raises(UserError, match=f"^phases.1.freeze: {error}"):
        Frozen.parse(words).check(8, tied, "phases.1.freeze")
    Frozen.parse(["embeddings", "layers 0-7"]).check(8, False, "phases.1.freeze")


def test_flops_of_a_frozen_trunk():
    """Layers of matrices M and attention A, forward; a head H."""
    model = ModelConfig(4, 64, 160, 4, 2, vocabulary_size=384)

    def of(*words, model=model):
        return training_flops(model, 100, (5000, 5000), 30, Frozen.parse(words))

    matrices, attention, head = 2 * model.parameters_per_layer * 100, 4 * 64 * 5000, 2 * 64 * 384 * 30
    layer = 3 * (matrices + attention)
    assert of() == training_flops(model, 100, (5000, 5000), 30) == 4 * layer + 3 * head
    assert of("embeddings") == of()  # its look-up costs nothing
    assert of("layers 1") == of() - matrices  # the gradient still goes through
    assert of("embeddings", "layers 0-1") == of() - 2 * (2 * matrices + 2 * attention)
    assert of("head") == of() - head
    assert of("embeddings", "layers 0-3") == 4 * (matrices + attention) + 2 * head
    tied = ModelConfig(4, 64, 160, 4, 2, vocabulary_size=384, tied_embeddings=True)
    assert of("embeddings", model=tied) == of() - head
    dense, both = 2 * 64 * 64 * 30, ModelConfig(4, 64, 160, 4, 2, vocabulary_size=384, tied_embeddings=True,
                                                prediction_head="dense")
    assert of(model=both) == of() + 3 * dense
    assert of("head", model=both) == of(model=both) - dense  # its matrix is the embeddings', which is trained
    assert of("embeddings", "layers 0-3", model=both) == 4 * (matrices + attention) + 2 * head + 2 * dense
    assert of("embeddings", "layers 0-2", "head", model=both) == (
        of("embeddings", "layers 0-2") - head + 2 * dense)  # the table's own gradient and the dense layer's
