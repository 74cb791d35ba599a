"""alignpipe: from a base language model to an aligned one with one command, from YAML."""

__version__ = "0.1.0"
