"""Packages `vis`; pure Python, so no compiler is needed. Configs, tools and data sets are used from a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent


def runtime_requirements() -> list[str]:
    """requirements.txt down to its development part."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# Development")[0]
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


setup(
    name="vis",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "vis/__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="One framework for video instance segmentation: MinVIS, DVIS, VITA, IDOL, IAI",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["vis", "vis.*"]),
    include_package_data=False,
    # detectron2 is needed as well: tools/install_detectron2.py
    install_requires=runtime_requirements(),
)
