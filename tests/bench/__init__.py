"""Measurements: ``python -m tests.bench``. The method is in README.md."""
