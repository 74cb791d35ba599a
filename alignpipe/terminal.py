"""What a person reads while a command works.

text -> standard output or error, or nowhere once nobody reads it any more
"""

import os

from rich.console import Console


class Terminal(Console):
    """A console that falls silent when its reader goes away, as `head` does, so that the work goes on.

    Args:
        stderr: write to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False)

    def on_broken_pipe(self) -> None:
        """Write nowhere from here on, together with everything else in this process that writes there."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
