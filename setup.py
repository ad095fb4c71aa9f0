"""Package list: moetrain and its rooms; conf/, which a wheel carries as moetrain.conf, and the job script of launch/.

Everything else is in pyproject.toml. No compiler runs here; tools/build_cuda.py will build the CUDA library.
"""

from setuptools import find_namespace_packages, find_packages, setup

conf = ["moetrain.conf"] + [f"moetrain.conf.{name}" for name in find_namespace_packages("conf")]

setup(
    packages=find_packages(include=["moetrain", "moetrain.*"]) + conf + ["moetrain.scripts"],
    package_dir={"moetrain.conf": "conf", "moetrain.scripts": "launch"},
    package_data={"moetrain.conf": ["*.yaml", "*/*.yaml"], "moetrain.scripts": ["*.sbatch"]},
)
