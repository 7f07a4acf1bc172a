"""Peak memory and time of importing a large random model, made on the fly, by one process and by two ranks.

    python benchmarks/import_memory.py [--billions 3] [--directory DIR] [--json PATH]

The checkpoint is a Llama of the given size with random bf16 weights in files of 1 GB, written tensor by tensor. Each
case is a process (or two) of its own, whose VmHWM the kernel keeps; a process that only imports what the verb imports
is measured beside them. `load` fills the tensor-parallel trunk of two ranks in bf16 from the import.

    import, 1 process       megatron-encdec import
    import, 2 ranks         the same with --nproc 2: each rank's peak
    load, TP 2              each of two ranks: its half of the trunk
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
         "num_key_value_heads": 8}
FILE_BYTES = 1 << 30

RANK = """
import sys, time
from megatron_encdec.platform import device
device.choose("cpu")
import torch
from megatron_encdec.interop.importing import import_model
from megatron_encdec.interop.source import find
from megatron_encdec.model.trunk import Trunk, transformer_config
from megatron_encdec.engine.loading import load_weights
from megatron_encdec.platform import distributed
case, source, run = sys.argv[1:]
started = time.perf_counter()
if case == "import":
    import_model(source, run, say=lambda _line: None)
elif case == "load":
    topology = distributed.initialize(tensor=2)
    found = find(run)
    model = found.config.model
    config = transformer_config(model, topology, torch.bfloat16, False)
    load_weights(found.checkpoint, Trunk(model, config, "torch", topology, 2048))
    distributed.shutdown()
seconds = time.perf_counter() - started
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("RESULT", peak, seconds)
"""


def write_model(directory: Path, billions: float) -> int:
    """A random Llama in `directory`; bytes of its tensors."""
    import torch
    import transformers
    from safetensors.torch import save_file

    table = SIZES["vocab_size"] * SIZES["hidden_size"]
    layer = SIZES["hidden_size"] * (3 * SIZES["intermediate_size"] + SIZES["hidden_size"] * 8 // 3)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=max(1, round((billions * 1e9 - table) / layer)),
                                      tie_word_embeddings=True, max_position_embeddings=2048,
                                      architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()
                  if name != "lm_head.weight"}
    config.save_pretrained(directory)
    parts, size = [{}], 0
    for name, shape in shapes.items():
        if size and size + 2 * shape.numel() > FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += 2 * shape.numel()
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in part.items()},
                  directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(2 * shape.numel() for shape in shapes.values())


def measure(case: str, ranks: int, source: Path, run: Path) -> tuple[list[int], float]:
    """(peak bytes of each rank, seconds of the slowest)."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [subprocess.Popen([sys.executable, "-c", RANK, case, str(source), str(run)], text=True,
                                  stdout=subprocess.PIPE,
                                  env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(ranks)]
    results = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case} on {ranks} ranks failed")
    lines = [line.split() for result in results for line in result.splitlines() if line.startswith("RESULT")]
    return [int(line[1]) for line in lines], max(float(line[2]) for line in lines)


def main() -> None:
    """Make the model, run the cases, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=3.0, help="parameters (default: 3)")
    parser.add_argument("--directory", help="where the model goes and is deleted again (default: a temporary one)")
    parser.add_argument("--json", metavar="PATH", help="keep the figures")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="import_memory.", dir=arguments.directory))
    try:
        started = time.perf_counter()
        (work / "model").mkdir()
        size = write_model(work / "model", arguments.billions)
        made = time.perf_counter() - started
        print(f"{size / 2e9:.2f}B parameters, {size / 1e9:.2f} GB in bf16, made in {made:.0f} s")
        results = {}
        for name, case, ranks, run in (("modules alone", "nothing", 1, "one"),
                                       ("import, 1 process", "import", 1, "one"),
                                       ("import, 2 ranks", "import", 2, "two"), ("load, TP 2", "load", 2, "one")):
            peaks, seconds = measure(case, ranks, work / "model", work / run)
            results[name] = {"peaks": peaks, "seconds": seconds, "times_the_model": sum(peaks) / size}
            shown = " + ".join(f"{peak / 1e9:.2f}" for peak in peaks)
            print(f"{name:<20} peak {shown:>12} GB   {sum(peaks) / size:5.2f} x the model   {seconds:6.1f} s")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"bytes": size, "cases": results}, indent=2) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
