import pytest

from megatron_encdec.data.config import DataConfig, RandomLength, SourceConfig
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build, to_dict


def test_defaults_and_round_trip():
    config = build(DataConfig, {"train": [{"path": "a"}, {"path": "b", "weight": 2}],
                                "random_length": {"min": 12, "max": 2048}}, "data")
    assert config.train == [SourceConfig("a", 1.0), SourceConfig("b", 2.0)]
    assert (config.validation, config.sequence_length, config.isolate_documents) == ([], 2048, True)
    assert config.random_length == RandomLength(12, 2048)
    assert build(DataConfig, to_dict(config), "data") == config


@pytest.mark.parametrize("change, message", [
    ({"train": []}, "data.train: empty"),
    ({"train": [{"path": "a", "weight": 0}]}, "data.train.0.weight: must be"),
    ({"train": [{"path": "a", "weight": float("nan")}]}, "data.train.0.weight: nan is no finite number"),
    ({"train": [{"path": "x.bin"}]}, "data.train.0.path: 'x.bin' is one file"),
    ({"train": [{"path": "a"}, {"path": "a"}]}, "data.train.1.path: 'a' is already source 0"),
    ({"seed": -1}, "data.seed: -1 is not at least 0"),
    ({"sequence_length": 1}, "data.sequence_length: 1 is not at least 2"),
    ({"random_length": {"min": 0, "max": 4}}, "data.random_length.min: 0 is not at least 1"),
    ({"random_length": {"min": 5, "max": 4}}, "data.random_length.min: 5 is above max"),
    ({"random_length": {"min": 5, "max": 4096}}, "data.random_length.max: 4096 is above"),
    ({"sequence_lenght": 8}, "did you mean 'sequence_length'"),
])
def test_a_mistake_names_its_key(change, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        build(DataConfig, {"train": [{"path": "a"}], **change}, "data")
