"""Packages that pyproject.toml cannot express: conf/ and recipes/ of the top level, installed inside the package."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["nemo_speculative*"]),
        "nemo_speculative.conf",
        "nemo_speculative.recipes",
    ],
    package_dir={"nemo_speculative.conf": "conf", "nemo_speculative.recipes": "recipes"},
    package_data={"nemo_speculative.conf": ["*.yaml", "*/*.yaml"], "nemo_speculative.inspect_data": ["*.html"]},
)
