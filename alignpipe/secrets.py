"""Secrets stand in no configuration, file or log: texts that look like one, and those of this very environment.

text -> whether it holds one; text -> the same with each of them blotted out
"""

import os
import re
from collections.abc import Iterator

BLOT = "***"
# Of hubs, clouds and servers; and in addresses, which are often pasted whole.
_FORMS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(
        r"(?<=[?&])(\w*token|\w*key|secret|password|sig|signature|x-amz-\w+)=[^&\s]{4,}", re.IGNORECASE
    ),
)
# Variables whose values are secrets, by their names.
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE|SECRET)_?KEY)$", re.IGNORECASE)
# What is shorter stands by chance in any text.
_MIN_LENGTH = 8


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a secret, or the value of a variable that is one by its name."""
    return hide_secrets(text) != text


def hide_secrets(text: str) -> str:
    """A text with every secret blotted out.

    >>> hide_secrets("https://joe:12345678@host/rows")
    'https://***@host/rows'
    """
    for value in _of_environment():
        text = text.replace(value, BLOT)
    for form in _FORMS:
        text = form.sub(BLOT, text)
    return text


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and _VARIABLE.search(name):
            yield value
