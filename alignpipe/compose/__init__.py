"""Words on the command line -> one checked configuration: `compose(words)`."""

from alignpipe.compose.composition import Composed, compose

__all__ = ["Composed", "compose"]
