"""Packaging: what is installed, and with which versions.

Exact pins are the ones whose inside this project stands on; the rest are floors. `tools/constraints.txt` pins
the whole development environment. Transformer Engine is in no extra: its setup needs a CUDA build of torch
already installed, so it cannot even be resolved elsewhere; `megatron-encdec doctor` prints its command.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """`__version__` of the package, read and not imported: its dependencies may not be there yet."""
    source = (HERE / "megatron_encdec" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE).group(1)


def read_readme() -> str:
    """The long description, empty where only the package was copied (as in a Docker layer)."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


def example_files() -> list[tuple[str, list[str]]]:
    """The example configs, for an installation without the repository: PREFIX/share/megatron-encdec/examples."""
    found: dict[str, list[str]] = {}
    for path in sorted((HERE / "examples").rglob("*")):
        if path.suffix in (".yaml", ".py") and path.is_file():
            folder = path.parent.relative_to(HERE)
            found.setdefault(f"share/megatron-encdec/{folder}", []).append(str(path.relative_to(HERE)))
    return list(found.items())


setup(
    name="megatron-encdec",
    version=read_version(),
    description="Text-encoder pretraining on Megatron-core whose objective changes mid-run",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_encdec", "megatron_encdec.*"]),
    package_data={"megatron_encdec.page": ["page.html"], "megatron_encdec.study": ["published.csv"]},
    data_files=example_files(),
    # Tested on 3.11 and 3.12, each with its megatron-core below (platform/optional.py: TESTED). 3.13 gets that of 3.12,
    # is not tested as a whole and not refused: `doctor` says so.
    python_requires=">=3.11",
    install_requires=[
        "torch==2.13.0",
        # 0.16.1 is the last for Python 3.11, 0.17 and later need 3.12; only platform/megatron.py knows the difference.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "transformers==5.18.0",  # the version that nemo-automodel 0.7.0 pins
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "datasets>=4.0",
        # Encodes many times faster than tokenizers; used where a sample proves its ids equal (text/encoder.py).
        "gigatoken==0.10.0; platform_system == 'Linux' and platform_machine == 'x86_64' or platform_system == 'Darwin'",
        "pyarrow>=15.0",  # Parquet and zstd; datasets brings it along
        "sentencepiece>=0.2",
        "protobuf>=5.0",  # transformers reads SentencePiece models with it when one is exported
        "numpy>=2.0",
        "orjson>=3.10",
        "packaging>=24.0",
        "psutil>=6.0",  # megatron.core's dist_checkpointing imports it without asking for it
        "pyyaml>=6.0",
        "rich>=13.0",
        "jinja2>=3.1",  # the page of a report; torch brings it along, and rich the next
        "markdown-it-py>=3.0",
    ],
    extras_require={
        # Fine-tuning recipes: not nemo-toolkit, which is for speech alone since 3.0. triton 3.9 breaks nemo_automodel's
        # import; it imports wandb where that is installed.
        "nemo": ["nemo-automodel==0.7.0", "seqeval>=1.2.2", "scikit-learn>=1.5", "scipy>=1.12", "bm25s>=0.3",
                 "wandb>=0.30", "triton>=3.7,<3.9; sys_platform == 'linux'"],
        # The verb evaluate, in the environment of fine-tuning or in any other.
        "mteb": ["mteb>=2.26", "sentence-transformers>=5.0"],
        # finetune --onnx.
        "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
        # Figures of a study, and its jobs under Slurm; not for training, so not in the base. submitit is not in dev:
        # the docstrings of .venv's packages are the demo's corpus.
        "study": ["matplotlib>=3.9", "submitit>=1.5.4"],
        # The site of docs/: zensical build --strict. Material for MkDocs, whose makers go on with it, ends in 2027;
        # it reads the same mkdocs.yml, and needs half as many packages.
        "docs": ["zensical>=0.0.70"],
        # What tests of fine-tuning compare with.
        "reference": ["pytrec-eval-terrier>=0.5.10", "sentence-transformers>=5.0"],
        "dev": ["pytest>=8.0", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff==0.17.6", "tensorboard>=2.18",
                "matplotlib>=3.9"],
    },
    entry_points={"console_scripts": ["megatron-encdec = megatron_encdec.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
