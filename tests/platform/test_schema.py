"""From YAML to dataclasses: what is converted, what is refused and how the key is named."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import apply_override, build, load_yaml, parse_yaml, to_dict


@dataclass(frozen=True)
class Part:
    path: str
    weight: float = 1.0
    kind: Literal["a", "b", 3] = "a"

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight: {self.weight} is below 0")


@dataclass(frozen=True)
class Short:
    """Written as a word or as a mapping."""

    name: str
    YAML_KEYS: ClassVar = {"run": str}

    @classmethod
    def from_yaml(cls, value, where):
        return cls(value) if isinstance(value, str) else build(cls, value, where)


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    sizes: dict[str, int] = field(default_factory=dict)
    from_: str | None = field(default=None, metadata={"key": "from"})
    steps: int | None = None
    ratio: float | Part = 0.5
    flag: bool = False
    short: Short | None = None


def whole(text: str) -> Whole:
    return build(Whole, parse_yaml(text, "c.yaml"))


def test_every_kind_of_value():
    config = whole("""
        parts: [{path: x, weight: 2, kind: b}, {path: y, kind: 3}]
        pair: [1e1, 3]
        sizes: {a: 1}
        from: z
        steps: 1e9
        ratio: 5e-4
        flag: true
        short: word""")
    assert config == Whole((Part("x", 2.0, "b"), Part("y", 1.0, 3)), (10, 3.0), {"a": 1}, "z", 10**9, 5e-4, True,
                           Short("word"))
    assert type(config.steps) is int and type(config.pair[0]) is int and type(config.pair[1]) is float
    assert to_dict(config)["from"] == "z" and build(Whole, to_dict(config)) == config
    assert whole("ratio: {path: x}").ratio == Part("x")
    assert build(Whole, None) == Whole()


@pytest.mark.parametrize(("text", "said"), [
    ("stesp: 1", "stesp: unknown key; did you mean 'steps'?"),
    ("zzz: 1", "zzz: unknown key (known: flag, from, pair, parts, ratio, short, sizes, steps)"),
    ("parts: [{weight: 1}]", "parts.0.path: missing; every config must give it"),
    ("stepping: 1", "stepping: unknown key; did you mean 'steps'?"),
    ("parts: [{path: x, kind: aa}]", "parts.0.kind: 'aa' is not one of a, b, 3; did you mean 'a'?"),
    ("parts: [{path: x}, {path: y, weight: -1}]", "parts.1.weight: -1.0 is below 0"),
    ("parts: {path: x}", "parts: expected a list, found a mapping"),
    ("parts: [1]", "parts.0: expected a mapping of keys, found an integer 1"),
    ("parts: [{path: 7}]", "parts.0.path: expected a string, found an integer 7; put it in quotes"),
    ("parts: [{path: x, kind: c}]", "parts.0.kind: 'c' is not one of a, b, 3"),
    ("parts: [{path: x, kind: true}]", "parts.0.kind: True is not one of a, b, 3"),
    ("pair: [1]", "pair: expected 2 items, found 1"),
    ("pair: [1.5, 2]", "pair.0: expected an integer, found a number 1.5"),
    ("sizes: [1]", "sizes: expected a mapping, found a list [1]"),
    ("sizes: {a: x}", "sizes.a: expected an integer, found a string 'x'"),
    ("steps: true", "steps: expected an integer, found a boolean True"),
    ("flag: 1", "flag: expected true or false, found an integer 1"),
    ("flag: null", "flag: expected true or false, found nothing None"),
    ("ratio: x", "ratio: expected a number or a mapping, found a string 'x'"),
    ("ratio: {pth: x}", "ratio.pth: unknown key; did you mean 'path'?"),
])
def test_a_mistake_is_named_by_its_key(text, said):
    with pytest.raises(UserError) as refused:
        whole(text)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(("content", "said"), [
    ("a: [1", "c.yaml:1:6: not valid YAML: "),
    ("a: 1\nb: 2\na: 3\n", "c.yaml:3:1: not valid YAML: key 'a' is given twice"),
    ("- a", "a config is a mapping of sections (run:, data:, phases:, ...), found a list"),
    ("", "found nothing"),
    (b"\xff", "cannot read the config: "),
    (None, "no such config file"),
])
def test_a_file_that_is_no_config(tmp_path, content, said):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        load_yaml(path)
    assert said in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(("override", "key", "value"), [
    ("steps=2", "steps", 2), ("steps=", "steps", None), ("from=1e5", "from", "1e5"), ("from=null", "from", None),
    ("from='a # b'", "from", "a # b"), ("from=[x", "from", "[x"), ("pair=[1, 2]", "pair", [1, 2]),
    ("sizes.b=3", "sizes", {"a": 1, "b": 3}), ("parts.0.path=a: b", "parts", [{"path": "a: b"}]),
    ("short.run=7", "short", {"run": "7"}), ("short.name=8", "short", {"name": "8"}),
])
def test_overrides(override, key, value):
    data = {"sizes": {"a": 1}, "parts": [{"path": "x"}], "short": None}
    apply_override(data, override, Whole)
    assert data[key] == value


@pytest.mark.parametrize(("override", "said"), [
    ("steps", "expected dotted.key=value"), ("=1", "expected dotted.key=value"),
    ("parts.1.path=x", "parts.1 is not an item of a list of 1"), ("parts.a=x", "parts.a is not an item"),
    ("steps.a=1", "steps is an integer, it has no keys"), ("sizes=[1", "not valid YAML"),
])
def test_overrides_that_lead_nowhere(override, said):
    with pytest.raises(UserError) as refused:
        apply_override({"parts": [{"path": "x"}], "steps": 1}, override, Whole)
    assert said in str(refused.value) and override in str(refused.value)
