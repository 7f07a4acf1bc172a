"""The verb `export`: a checkpoint to a stock Hugging Face model directory."""

import argparse
import os
import sys

from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.hugging_face import DTYPES, FILE_SIZE
from megatron_encdec.platform import device
from megatron_encdec.platform.errors import ParityError, UserError
from megatron_encdec.platform.ranks import RankEnvironment

DESCRIPTION = """\
Write a checkpoint as a Hugging Face model directory that loads with no code but transformers' own: a causal
checkpoint as its family's class (LlamaForCausalLM, ...), a masked-language-model checkpoint as EuroBertForMaskedLM,
ModernBertForMaskedLM or, where neither can hold the trunk, as its family's class, which its config then lets see to
both sides (is_causal: false; in Gemma 3 use_bidirectional_attention).

  megatron-encdec export runs/a models/a                    the newest checkpoint
  megatron-encdec export runs/a@1000 models/a-clm           the checkpoint of step 1000
  megatron-encdec export runs/a@1000 models/a-enc --as eurobert --dtype bf16

The result holds weights (safetensors), config, tokenizer and a model card; before it appears under its name
it is loaded back and its logits are compared with the trunk's. The same command again finds nothing to do.
Paths in a run's config are relative to where pretrain ran: export from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `export`."""
    parser.add_argument("run", metavar="RUN_DIR[@STEP]", help="run directory; default: newest checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory to make; has its name only when everything is done; must "
                        "not exist, or be empty, or hold this very export (another one: --force)")
    parser.add_argument("--as", dest="as_", metavar="CLASS", default="auto",
                        help="auto (default): by the objective of that step and the trunk's family; "
                             f"{', '.join(TARGETS)}")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of the weights (default: fp32; for an import what it came in)")
    parser.add_argument("--shard-size", dest="file_size", default=FILE_SIZE, metavar="SIZE",
                        help=f"of a safetensors file at most, e.g. 500MB (default: {FILE_SIZE})")
    parser.add_argument("--force", action="store_true", help="replace another export at OUT")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    try:
        export_here(arguments.run, arguments.out, arguments.as_, arguments.dtype, arguments.force, arguments.file_size)
    except ParityError as error:
        print(f"megatron-encdec: export: {error}; nothing was written", file=sys.stderr)
        return 1
    return 0


def export_here(run: str, out: str, as_: str = "auto", dtype: str = "auto", force: bool = False,
                file_size: str = FILE_SIZE) -> float | None:
    """`interop.export.export` in this process, on the CPU, whatever the machine has."""
    _be_one_process()
    device.choose("cpu")  # before megatron.core is imported
    from megatron_encdec.interop.export import export

    return export(run, out, as_, dtype, force, file_size=file_size)


def _be_one_process() -> None:
    """Refuse several ranks; inside one task of a Slurm allocation be the only one."""
    environment = RankEnvironment.read()
    if environment.world_size > 1 and ("RANK" in os.environ or environment.rank > 0):
        raise UserError(f"export: runs in one process, this is rank {environment.rank} of "
                        f"{environment.world_size}; start it without torchrun or srun")
    if environment.world_size > 1:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
