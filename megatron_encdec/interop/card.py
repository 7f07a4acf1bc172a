"""The model card: what a reader needs to know of the run before using the model."""

from megatron_encdec.interop.families.family import Target
from megatron_encdec.interop.mask_token import KINDS
from megatron_encdec.interop.source import Source, parent_of
from megatron_encdec.objectives.base import OBJECTIVES
from megatron_encdec.rundir.metrics import read_metrics
from megatron_encdec.training.stretches import by_phase, tokens_between

_FILL_MASK = """\
from transformers import pipeline

fill = pipeline("fill-mask", "PATH")
for guess in fill(f"The encoder reads {fill.tokenizer.mask_token} word."):
    print(guess["token_str"], guess["score"])"""
_EMBED = """\
from transformers import pipeline

embed = pipeline("feature-extraction", "PATH")
print(embed("The encoder reads every word.", return_tensors=True).shape)"""
_GENERATE = """\
from transformers import pipeline

generate = pipeline("text-generation", "PATH")
print(generate("The encoder", max_new_tokens=20)[0]["generated_text"])"""


def model_card(source: Source, target: Target, dtype: str, remarks: list[str]) -> str:
    """README.md of the export, with the front matter that model hubs read."""
    state, config = source.state, source.config
    model = config.model
    task, use = ("fill-mask", _FILL_MASK) if target.is_encoder else ("text-generation", _GENERATE)
    if about_head(source, target):
        task, use = "feature-extraction", _EMBED
    notes = "".join(f"\n- {remark[0].upper()}{remark[1:]}." for remark in remarks)
    return f"""\
---
library_name: transformers
pipeline_tag: {task}
tags: [megatron_encdec, {state.objective}]
---
# {target.model_class}, step {state.step}

A trunk of {model.parameter_count() / 1e6:,.1f}M parameters ({model.num_layers} layers, hidden size \
{model.hidden_size}, {model.num_attention_heads} heads, {model.num_query_groups} key/value groups), \
pretrained with megatron_encdec and exported as a stock `{target.model_class}`: {target.attention} \
attention, weights in {dtype}.

```python
{use}
```

## Training

{_training(source)}

{_metrics(source)}## Origin

- history hash: `{state.history_hash}`
- training data: {", ".join(f"`{fingerprint}`" for fingerprint in state.data_fingerprints) or "none"}
- tokenizer: `{state.tokenizer_fingerprint}`
- versions: {", ".join(f"{name} {version}" for name, version in state.versions.items())}{notes}
"""


def about_head(source: Source, target: Target) -> list[str]:
    """What to know of an encoder whose head was not trained to fill in the mask that it reads."""
    objective = OBJECTIVES.get(source.state.objective)
    if objective is None or not objective.predicts or not target.is_encoder:
        return []
    return [f"trained last with {objective.name}, whose head predicts the token one position after the output that it "
            "reads: fill-mask takes the wrong output; use the hidden states, or train with mlm first"]


def about_length(trained: int, positions: int) -> list[str]:
    """What to know of an encoder whose config names more `positions` than the windows that it was `trained` on."""
    if trained >= positions:
        return []
    return [f"sentence-transformers cuts texts at {trained:,} tokens, the longest windows that this model was trained "
            f"on as an encoder; its source knew {positions:,} positions, which config.json still names "
            "(max_seq_length in sentence_bert_config.json is the number to change)"]


def about_window(source: Source, target: Target) -> list[str]:
    """What to know of an encoder with sliding windows in a decoder's class (transformers 5.18 hands flash attention
    the bounds of a causal window)."""
    window = source.model.sliding_window
    by_is_causal = not target.is_native and "is_causal" in target.family.turned(source.model)  # Gemma 3 has its own key
    if window is None or not target.is_encoder or not by_is_causal:
        return []
    return [f"a token sees {window:,} tokens on either side where sliding windows are, under eager attention and SDPA; "
            f"transformers' flash attention would let it see {window - 1:,}"]


def _training(source: Source) -> str:
    """Where the weights began, and what was done to them."""
    state, weights = source.state, source.state.history.get("weights")
    if state.merged:
        return f"Not trained, but {_merge(state.merged)}"
    imported, began = source.imported, ""
    if weights and not imported:
        parent = parent_of(source)
        imported = parent and parent.imported
        began = (f"Begun with the weights of another run at step {weights['step']} (history hash "
                 f"`{weights['history_hash']}`), with a fresh optimizer.\n\n")
        if parent and parent.merged:
            began += f"Those were {_merge(parent.merged)}\n\n"
    if imported:
        files = ", ".join(f"`{name}` (sha256 `{digest}`)" for name, digest in imported["weights"].items())
        said = (f"the weights of a `{imported['architecture']}`: {files}; mask token: "
                f"{KINDS[imported['mask']['kind']]}.")
        if source.imported:
            return f"Imported, not trained: {said}"
        began = f"Begun with {said}\n\n"
    return f"""{began}{_phases(source)}

{state.tokens:,} input tokens and {state.targets:,} predicted tokens in all, in windows of \
{source.sequence_length} tokens{" at most" if len({one.data.sequence_length for one in source.done}) > 1 else ""}."""


def _merge(merged: dict) -> str:
    """What a merge was made of."""
    parts = [f"{weight:.6g} × `{model}`, step {one['step']} (history hash `{one['history_hash']}`)"
             for weight, model, one in zip(merged["weights"], merged["models"], merged["of"], strict=True)]
    return f"merged ({merged['method']}) of {'; '.join(parts)}."


def _phases(source: Source) -> str:
    """A table of the phases up to the checkpoint; the one that it interrupts is cut there."""
    lines = ["| phase | objective | steps | tokens |", "|---|---|---|---|"]
    for parts in by_phase(source.done):
        phase, end, objective = parts[0], min(parts[-1].end, source.state.step), parts[0].objective
        settings = {key: value for key, value in objective.to_yaml().items() if key != "name"}
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        told = f"{objective.name}{f' ({told})' if told else ''}"
        if any(isinstance(value, (dict, list)) for value in settings.values()):
            told = objective.label()
        lines.append(f"| {phase.name} | {told} | {phase.start + 1}–{end} | {tokens_between(parts, 0, end):,} |")
    return "\n".join(lines)


def _metrics(source: Source) -> str:
    """The last losses that the run noted up to the checkpoint."""
    last, lines = {}, []
    for record in read_metrics(source.run / "metrics.jsonl", torn_tail=True):
        if record.get("step", 0) <= source.state.step and (record["kind"] != "train" or record["loss"] is not None):
            last[record["kind"]] = record
    if trained := last.get("train"):
        lines.append(f"- training loss ({trained['objective']}, step {trained['step']}): {trained['loss']:.4f}")
    if evaluated := last.get("eval"):
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in evaluated["losses"].items() if loss is not None)
        lines.append(f"- validation loss by objective (step {evaluated['step']}): {shown}")
    return "\n".join(lines) + "\n\n" if lines else ""
