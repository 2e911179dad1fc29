"""The packages of the wheel: those in rmlora_jax/, and configs/ as rmlora_jax.configs.

Everything else is in pyproject.toml, which cannot add one package to those that are found.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rmlora_jax*"]), "rmlora_jax.configs"],
    package_dir={"rmlora_jax.configs": "configs"},
)
