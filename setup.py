"""List of packages: moetrain, conf/ as moetrain.conf, and the job script of launch/ as moetrain.scripts.

Everything else is in pyproject.toml. No compiler runs here: tools/build_cuda.py builds the CUDA kernels.
"""

from setuptools import find_namespace_packages, find_packages, setup

conf = ["moetrain.conf"] + [f"moetrain.conf.{name}" for name in find_namespace_packages("conf")]

setup(
    packages=find_packages(include=["moetrain", "moetrain.*"]) + conf + ["moetrain.scripts"],
    package_dir={"moetrain.conf": "conf", "moetrain.scripts": "launch"},
    package_data={"moetrain.conf": ["*.yaml", "*/*.yaml"], "moetrain.scripts": ["*.sbatch"]},
)
