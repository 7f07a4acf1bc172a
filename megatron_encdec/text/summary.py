"""What `preprocess` made, in words and numbers: what the verb prints, and what its Python function returns."""

from dataclasses import dataclass, fields

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.manifest import LOSSES, TRAIN, Manifest, read, split_prefixes
from megatron_encdec.text.preprocess import PreprocessSettings, preprocess


@dataclass(frozen=True)
class Preprocessed:
    """Token files by their prefix, in order: `PREFIX`, then `PREFIX.validation` where documents were set aside."""

    manifests: dict[str, Manifest]

    @property
    def train(self) -> Manifest:
        """`documents`, `tokens`, `skipped`, `fingerprint`, ... of what is to train on."""
        return next(iter(self.manifests.values()))

    @property
    def validation(self) -> Manifest | None:
        """The same of what was set aside; None where nothing was asked to be."""
        return list(self.manifests.values())[1] if len(self.manifests) > 1 else None

    def __str__(self) -> str:
        lines = [f"{prefix}: {part.documents:,} documents, {part.tokens:,} tokens ({part.dtype}), fingerprint "
                 f"{part.fingerprint[:12]}" for prefix, part in self.manifests.items()]
        lines += [f"skipped, {reason}: {skipped.count:,} (first: {', '.join(skipped.examples)})"
                  for reason, skipped in self.train.skipped.items()]
        for loss, what in LOSSES.items():
            if count := sum(part.losses()[loss] for part in self.manifests.values()):
                lines.append(f"note: {count:,} {what}")
        if cuts := self.train.unproven_cuts:
            lines.append(f"note: in {cuts:,} places very long text without blanks was cut for the tokenizer")
        return "\n".join(lines)


def summary(prefix: str, manifest: Manifest) -> Preprocessed:
    """What stands at `prefix`, whose `manifest` this is."""
    prefixes = split_prefixes(prefix, manifest.settings.validation_percent)
    return Preprocessed({str(name): manifest if split == TRAIN else read(name) for split, name in prefixes.items()})


def preprocessed(inputs: list[str], tokenizer: str, output: str, **options) -> Preprocessed:
    """`preprocess`, summed up; an option that it does not have is a `UserError`."""
    known = {"train_tokenizer", "progress", *(field.name for field in fields(PreprocessSettings))}
    if strange := sorted(options.keys() - known):
        raise UserError(f"preprocess: {strange[0]} is no option of it (known: {', '.join(sorted(known))})")
    return summary(output, preprocess(inputs, tokenizer, output, **options))
