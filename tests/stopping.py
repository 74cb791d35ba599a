"""A stage that is stopped, as a signal stops it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from alignpipe.errors import Stopped
from alignpipe.training.context import Context


@contextmanager
def stopped_at_the_first_save() -> Iterator[None]:
    """What is run inside ends once its first state is saved."""
    save = Context.save

    def stopping(context: Context, *given: Any, **named: Any) -> None:
        save(context, *given, **named)
        raise Stopped("as a signal would")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Context, "save", stopping)
        yield
