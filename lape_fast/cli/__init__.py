"""The command line ``lape-fast``."""

from lape_fast.cli.app import app, main

__all__ = ["app", "main"]
