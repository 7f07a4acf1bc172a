"""The verb `import`: a Hugging Face model directory to a run directory with a checkpoint at step 0."""

import argparse
import importlib
import os
import time

from megatron_encdec.platform import device
from megatron_encdec.platform.launcher import Nodes, at_least_one, launch

DESCRIPTION = """\
Take over a released model: Llama, Mistral, Qwen2/3, Gemma 2/3 (text), OLMo 2/3, SmolLM2/3, Granite, Phi-3/4, EuroBERT,
ModernBERT and its decoder (Ettin, mmBERT), from a directory with config.json, safetensors and tokenizer. A model that
needs something which the trunk cannot compute is refused, with the key that asks for it. No code of it is run.
Where two files contradict each other (model.safetensors and an index), the one that transformers takes is taken.

  megatron-encdec import models/SmolLM2-135M runs/smollm2
  megatron-encdec import models/Llama-3.1-8B runs/llama --nproc 8             eight ranks share the reading

The run directory holds config.yaml (model, tokenizer), the tokenizer with a mask token, and the checkpoint of step 0.
Train on from it (continued pretraining: fresh optimizer, own schedule) with

  run: {dir: runs/mlm, from: {path: runs/smollm2, state: weights}}
  model: {run: runs/smollm2}
  tokenizer: {path: runs/smollm2/tokenizer}

or write it back with `export`. The mask is the tokenizer's own, else a reserved token, else one added whose embedding
is the mean of all rows.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `import`."""
    parser.add_argument("model", metavar="HF_DIR", help="directory with config.json and safetensors")
    parser.add_argument("run", metavar="RUN_DIR", help="run directory to make; has its name only when everything is "
                        "done; must not exist, or be empty")
    parser.add_argument("--mask-token", default="auto", metavar="TOKEN",
                        help="auto (default), none, or the name of a token that the tokenizer has")
    parser.add_argument("--eod-token", metavar="TOKEN", help="end of document (default: the tokenizer's own)")
    parser.add_argument("--tokenizer", metavar="PATH", help="another tokenizer than the directory's")
    parser.add_argument("--new-head", action="store_true",
                        help="the model has no language-model head (a fine-tuned encoder): give it a random one "
                        "(a tied trunk: its embeddings), which must be trained (MLM) before the model can fill masks")
    parser.add_argument("--ignore", action="append", default=[], metavar="KEY",
                        help="a key of config.json that is known to change nothing; adapter: take the base without "
                        "the adapter beside it")
    parser.add_argument("--nproc", type=int, metavar="N", help="read and write with N ranks on this machine")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    device.choose("cpu")  # before megatron.core is imported
    at_least_one("--nproc", arguments.nproc)
    if (arguments.nproc or 1) > 1:
        of_a_rank = argparse.Namespace(**{**vars(arguments), "nproc": None})
        return launch(run, (of_a_rank,), Nodes(arguments.nproc), time.time(),
                      lambda: importlib.import_module("megatron_encdec.interop.importing"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from megatron_encdec.interop.importing import Wish, import_model
    from megatron_encdec.platform.distributed import peers

    wish = Wish(arguments.mask_token, arguments.tokenizer, arguments.eod_token, arguments.ignore, arguments.new_head)
    with peers():
        import_model(arguments.model, arguments.run, wish)
    return 0
