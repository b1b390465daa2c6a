"""Everything about the distribution is declared in pyproject.toml."""

from setuptools import setup

setup()
