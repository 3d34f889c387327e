"""lape_fast: find the feed-forward neurons of a language, and tune only those."""

__version__ = "0.1.0"
