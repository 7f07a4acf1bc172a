"""How many masked tokens an encoder gets right: `python tools/masked_accuracy.py --data PREFIX NAME=MODEL_DIR ...`.

Every model is loaded as a user would load it, with transformers' own classes, and sees the same windows of PREFIX (what
`preprocess` wrote) with the same masks; all of them must have one tokenizer. A decoder's directory can be named too:
it is then asked with causal attention, as it is.
"""

import argparse
import os
import sys

import numpy as np

from megatron_encdec.platform.errors import UserError


def main() -> int:
    """Parse, measure, print a table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL_DIR")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="token files, held out from training")
    parser.add_argument("--windows", type=int, default=64, help="default: 64")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window (default: 128)")
    parser.add_argument("--mask-ratio", type=float, default=0.15, help="default: 0.15")
    arguments = parser.parse_args()
    try:
        rows = []
        for entry in arguments.models:
            name, equals, path = (entry, "=", entry) if os.path.isdir(entry) else entry.partition("=")
            if not equals or not os.path.isfile(os.path.join(path, "config.json")):
                raise UserError(f"{entry}: write NAME=MODEL_DIR, with a directory that holds a model's config.json")
            rows.append((name, *measure(path, arguments)))
    except UserError as error:
        print(f"masked_accuracy: {error}", file=sys.stderr)
        return 2
    print_table(rows, arguments)
    return 0


def measure(path: str, arguments) -> tuple[float, float, int]:
    """(accuracy, mean loss in nats, masked tokens) of the model at `path`."""
    import torch
    import transformers

    from megatron_encdec.data.config import DataConfig, SourceConfig
    from megatron_encdec.data.samples import Samples
    from megatron_encdec.objectives.base import OBJECTIVES, Vocabulary
    from megatron_encdec.text.tokenizer import load_tokenizer

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    auto = "AutoModelForMaskedLM" if config.model_type == "eurobert" else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(path)
    data = DataConfig(train=[SourceConfig(arguments.data)], sequence_length=arguments.length, isolate_documents=False)
    samples = Samples(data, "train")
    for store in samples.stores:
        if store.tokenizer:
            tokenizer.check_wrote(store.prefix, store.tokenizer.fingerprint, "HF_DIR")
    objective, vocabulary = OBJECTIVES["mlm"](mask_ratio=arguments.mask_ratio), Vocabulary.of(tokenizer)
    right = total = 0
    loss = 0.0
    for number in range(arguments.windows):
        labelled = objective.apply(samples.sample(number), samples.seed, vocabulary)
        with torch.no_grad():
            inputs_S = torch.from_numpy(labelled.inputs_S.astype(np.int64))
            logits_NV = model(input_ids=inputs_S[None]).logits[0, torch.from_numpy(labelled.positions_N)]
        labels_N = torch.from_numpy(labelled.labels_N.astype(np.int64))
        right += int((logits_NV.argmax(dim=1) == labels_N).sum())
        loss += torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum").item()
        total += len(labels_N)
    return right / total, loss / total, total


def print_table(rows, arguments) -> None:
    """One row a model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("model", "masked-token accuracy", "loss", title=f"{rows[0][3]:,} masked tokens, "
                  f"{arguments.mask_ratio:.0%} of {arguments.windows} held-out windows of {arguments.length}")
    for name, accuracy, loss, _ in rows:
        table.add_row(Text(name), f"{accuracy:.1%}", f"{loss:.3f}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
