"""The records that data sets are made of, whatever file they came from: rows of any format -> these types.

A prompt is a conversation that ends with what the assistant is to answer; a response is text.
"""

from dataclasses import dataclass
from typing import Literal

Degree = Literal["significantly", "better", "slightly", "negligibly"]
RecordType = Literal["demonstrations", "rankings", "unpaired", "prompts", "text"]
RECORD_TYPES: tuple[RecordType, ...] = ("demonstrations", "rankings", "unpaired", "prompts", "text")
ROLES = ("system", "user", "assistant")
# InstructGPT's labelers ranked 4 to 9 responses (arXiv:2203.02155, 3.5); a pair is the smallest ranking.
MIN_RESPONSES, MAX_RESPONSES = 2, 9
# How much better the chosen response is, in the words of Llama 2's annotators (arXiv:2307.09288, 3.2.1).
DEGREES: tuple[Degree, ...] = ("significantly", "better", "slightly", "negligibly")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: What was said.
        input: Alpaca's second field, the text that an instruction is about; None where there is none.
    """

    role: str
    content: str
    input: str | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation whose last message is the assistant's, to be imitated."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last one."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Ranking:
    """Two to nine responses to one prompt, ranked.

    Attributes:
        prompt: Messages up to the response.
        responses: The texts.
        ranks: One a response; 1 is best, equal ranks are ties.
        gold: True worth of each response, where it is known.
        margin: By how much the best is better, a number of at least 0 or a degree, where people said it.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    gold: tuple[float, ...] | None = None
    margin: float | Degree | None = None

    @property
    def best(self) -> int:
        """Index of the response ranked first; the earliest of a tie."""
        return min(range(len(self.ranks)), key=self.ranks.__getitem__)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A response that is good or bad by itself.

    Attributes:
        prompt: Messages up to the response.
        response: The text.
        desirable: Whether it is good.
    """

    prompt: tuple[Message, ...]
    response: str
    desirable: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant's response."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The same messages, by the name that the other records use."""
        return self.messages


@dataclass(frozen=True, slots=True)
class Text:
    """A raw document."""

    text: str


Record = Demonstration | Ranking | Unpaired | Prompt | Text


def messages_text(messages: tuple[Message, ...]) -> str:
    """Returns the text of a conversation: a lone user turn is its content, else `role: content` blocks."""
    if len(messages) == 1 and messages[0].role == "user":
        return content_text(messages[0])
    return "\n\n".join(f"{message.role}: {content_text(message)}" for message in messages)


def content_text(message: Message) -> str:
    """Returns a message's content with its `input`, if any, a blank line below."""
    return message.content if message.input is None else f"{message.content}\n\n{message.input}"


def prompt_text(record: Record) -> str:
    """Returns the canonical text of a record's prompt, which decides its share; a document's is itself."""
    return record.text if isinstance(record, Text) else messages_text(record.prompt)
