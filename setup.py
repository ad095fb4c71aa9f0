"""Package list: moetrain and its rooms, and conf/, which a wheel carries as moetrain.conf.

Everything else is in pyproject.toml. No compiler runs here; tools/build_cuda.py will build the CUDA library.
"""

from setuptools import find_namespace_packages, find_packages, setup

conf = ["moetrain.conf"] + [f"moetrain.conf.{name}" for name in find_namespace_packages("conf")]

setup(
    packages=find_packages(include=["moetrain", "moetrain.*"]) + conf,
    package_dir={"moetrain.conf": "conf"},
    package_data={"moetrain.conf": ["*.yaml", "*/*.yaml"]},
)
