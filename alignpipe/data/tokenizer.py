"""Text and conversations -> token ids, on the `tokenizers` library alone (transformers would pull torch in).

What is learnt and what is sampled go through the same code: a conversation's ids are the prompt's ids
followed by the response's, so a prompt is a prefix of its examples by construction and a response ends in the
token that stops sampling. Prompt ids are those of transformers' `apply_chat_template`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import tokenizers

from alignpipe.data.records import Message
from alignpipe.data.template import TOY_TEMPLATE, ChatTemplate
from alignpipe.data.tokenizer_files import TokenizerFiles, read_tokenizer, write_tokenizer
from alignpipe.errors import CheckpointError
from alignpipe.toy.tokenizer import EOS, PAD, train_tokenizer

# Stands inside a special token that somebody typed, so that it is text and no control token. A noncharacter:
# no text has a use for it.
_BREAK = "\ufdd0"
_PROBE = "probe"
# Characters of a prompt that are read again before a response; no token that could reach over is longer.
_CONTEXT = 32


class _Encoding(NamedTuple):
    """Ids, with begin and end of the characters that each came from."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
        pad_id: Fills batches; never an id that ends a response.
        bos_id: Begins every sequence; None if there is no such token.
        eos_id: Ends documents, and responses if the template has no token of its own for that.
        turn_end_id: Ends a response under the template.
        stop_ids: The ids at which sampling stops: `turn_end_id` and `eos_id`.
        pad_added: Whether the pad token is new in the vocabulary.
        vocab_size: Rows that an embedding needs: the highest id and one.
    """

    def __init__(self, files: TokenizerFiles, template: str) -> None:
        """Joins a tokenizer and a template; `load` and `toy` are the usual ways to get one.

        Args:
            files: The tokenizer.
            template: Jinja source of the chat template. BOS is put before it if the tokenizer begins every
                text with one and the template does not, so that no user of the template leaves it out.

        Raises:
            CheckpointError: The template is broken, or pads and ends with the same token.
        """
        self._files, self._backend = files, files.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        # A second copy, which reads special tokens as the text they are.
        self._literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
        self._literal.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self._controls = {token.content: index for index, token in added.items() if token.special}
        self._template = ChatTemplate(template)
        opened = files.bos is not None and self._render((Message("user", _PROBE),)).startswith(files.bos)
        if files.adds_bos and not opened:
            self._template = ChatTemplate("{{ bos_token }}" + template)
        self.bos_id = (
            self._controls[files.bos] if files.bos is not None and (opened or files.adds_bos) else None
        )
        self.eos_id = self._controls[files.eos]
        self.pad_id = self._controls[files.pad]
        self.pad_added = files.pad_added
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._turn_end, self._tail = self._probe_turn_end()
        self.turn_end_id = self._controls[self._turn_end]
        self.stop_ids = tuple(dict.fromkeys((self.turn_end_id, self.eos_id)))
        if self.pad_id in self.stop_ids:
            raise CheckpointError(
                f"the pad token {files.pad!r} also ends responses in the chat template; set another "
                "pad_token in "
                "tokenizer_config.json"
            )

    @classmethod
    def load(cls, folder: Path, fallback_template: str) -> "Tokenizer":
        """Opens the tokenizer of a model folder.

        Args:
            folder: With `tokenizer.json`, and what transformers writes beside it.
            fallback_template: Jinja source of the template for a model that has none (see `find_template`).

        Raises:
            CheckpointError: There is no `tokenizer.json`, a file is broken, or no token ends a text.
        """
        files = read_tokenizer(folder)
        return cls(files, files.template or fallback_template)

    @classmethod
    def toy(cls) -> "Tokenizer":
        """Returns the embedded world's tokenizer, with its own template."""
        return _toy()

    @property
    def chat_template(self) -> str:
        """The Jinja source that is trained on and saved."""
        return self._template.source

    @property
    def fingerprint(self) -> str:
        """A sha256 of the vocabulary, the template and the special ids."""
        ids = repr((self.pad_id, self.bos_id, self.eos_id))
        parts = "\0".join((self._backend.to_str(), self.chat_template, ids))
        return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a conversation up to and with what opens the assistant's turn.

        Raises:
            CheckpointError: The template refuses the conversation.
        """
        return self._ids(self._render(self._broken(messages), open_turn=True))

    def encode_response(self, messages: Sequence[Message], text: str) -> list[int]:
        """Returns the ids that follow those of the prompt when the assistant says `text`, turn end included.

        Raises:
            CheckpointError: The template refuses the conversation, or changes the prompt once it is answered.
        """
        return self.encode_responses(messages, [text])[1][0]

    def encode_responses(
        self, messages: Sequence[Message], texts: Iterable[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Returns the ids of a prompt and of each of several responses to it.

        Raises:
            CheckpointError: As in `encode_response`.
        """
        messages = self._broken(messages)
        prompt = self._render(messages, open_turn=True)
        return self._ids(prompt), self._responses(messages, texts, prompt)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns the ids of a conversation that ends with the assistant, and which of them are learnt.

        Learnt is each assistant turn with the token that ends it. A template may write a turn otherwise once
        the conversation has gone on (some leave out its reasoning); what is learnt of that turn is what
        stands there.

        Raises:
            CheckpointError: As in `encode_response`.
            ValueError: The last message is not the assistant's.
        """
        if not messages or messages[-1].role != "assistant":
            raise ValueError("a conversation to learn from must end with the assistant")
        before = self._broken(messages[:-1])
        prompt = self._render(before, open_turn=True)
        response = self._responses(before, [messages[-1].content], prompt)[0]
        turns = self._earlier_turns(before, prompt)
        if not turns:
            # Where each token stands takes time to tell, and most conversations have one turn.
            ids = self._ids(prompt)
            return ids + response, [False] * len(ids) + [True] * len(response)
        ids, spans = self._encode(prompt)
        mask = [False] * len(ids)
        for begin, end in turns:
            for index, (first, last) in enumerate(spans):
                mask[index] = mask[index] or begin <= first < last <= end
        return ids + response, mask + [True] * len(response)

    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of a raw text, after BOS if there is one; special tokens in it are read as text."""
        ids = self.encode_continuation(text)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the ids of a text that goes on from another; special tokens in it are read as text."""
        ids: list[int] = self._literal.encode(text, add_special_tokens=False).ids
        return ids

    def readable(self, ids: Sequence[int]) -> str | None:
        """Returns the text that transformers' tokenizer of the same files reads as these ids; None if there is none."""
        whole = self._backend.decode(list(ids), skip_special_tokens=False)
        for text in (whole, whole.removeprefix(self._files.bos or "")):
            if self._backend.encode(text).ids == list(ids):
                return str(text)
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def count_controls(self, text: str) -> int:
        """Counts the special tokens that somebody typed into a text."""
        return sum(text.count(token) for token in self._controls)

    def save(self, folder: Path) -> None:
        """Writes the files that give the same ids in plain transformers, the template byte for byte."""
        write_tokenizer(self._files, self.chat_template, folder)

    def _render(self, messages: Sequence[Message], open_turn: bool = False) -> str:
        return self._template.render(messages, open_turn, self._files.bos, self._files.eos)

    def _broken(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Puts a break into each special token that somebody typed."""
        return tuple(
            replace(
                message,
                content=self._break(message.content),
                input=None if message.input is None else self._break(message.input),
            )
            for message in messages
        )

    def _break(self, text: str) -> str:
        for token in self._controls:
            if len(token) > 1 and token in text:
                text = text.replace(token, token[0] + _BREAK + token[1:])
        return text

    def _ids(self, text: str) -> list[int]:
        """Encodes rendered text, without where its tokens stand."""
        if _BREAK in text:
            return self._encode(text).ids
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _encode(self, text: str) -> _Encoding:
        """Encodes rendered text: the template's special tokens are tokens, broken ones are text."""
        if _BREAK not in text:
            encoding = self._backend.encode(text, add_special_tokens=False)
            return _Encoding(encoding.ids, encoding.offsets)
        result = _Encoding([], [])
        at = 0
        for piece in _split(text, self._controls):
            if piece in self._controls:
                result.ids.append(self._controls[piece])
                result.spans.append((at, at + len(piece)))
            else:
                kept = [at + index for index, character in enumerate(piece) if character != _BREAK]
                encoding = self._literal.encode(piece.replace(_BREAK, ""), add_special_tokens=False)
                result.ids.extend(encoding.ids)
                result.spans.extend(
                    (kept[first], kept[last - 1] + 1) if first < last else (at, at)
                    for first, last in encoding.offsets
                )
            at += len(piece)
        return result

    def _responses(self, messages: tuple[Message, ...], texts: Iterable[str], prompt: str) -> list[list[int]]:
        """Encodes responses behind the end of their prompt; some tokenizers begin a text with a space."""
        context = prompt[-_CONTEXT:]
        context_ids = self._ids(context)
        responses = []
        for text in texts:
            full = self._render((*messages, Message("assistant", self._break(text))))
            if not full.startswith(prompt):
                raise CheckpointError(
                    "the model's chat template writes the prompt otherwise once it is answered, so no "
                    "response "
                    "can be told from its prompt; remove the template to use model.chat_template=plain"
                )
            body = full[len(prompt) : self._turn_end_at(full, len(prompt))]
            ids = self._ids(context + body)
            if ids[: len(context_ids)] != context_ids:
                # The last token of the prompt and the first of the response would run into one.
                ids = context_ids + self._ids(body)
            responses.append([*ids[len(context_ids) :], self.turn_end_id])
        return responses

    def _turn_end_at(self, text: str, start: int) -> int:
        """Returns where, in a text that ends with a turn, the token stands that ends it."""
        at = (
            len(text.removesuffix(self._tail)) if self._tail is not None else text.find(self._turn_end, start)
        )
        return at if at >= start else len(text)

    def _earlier_turns(self, messages: tuple[Message, ...], prompt: str) -> list[tuple[int, int]]:
        """Returns where each assistant turn begins and ends in a rendered prompt, its last token included."""
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:index], open_turn=True)
            if not prompt.startswith(before):
                continue
            if self._tail is None:
                end = prompt.find(self._turn_end, len(before)) + len(self._turn_end)
            else:
                end = self._turn_end_at(self._render(messages[: index + 1]), len(before))
            spans.append((len(before), end))
        return spans

    def _probe_turn_end(self) -> tuple[str, str | None]:
        """Finds what the template writes after a response.

        Returns:
            The token that ends it and None, or, if the template has none, EOS and the text that EOS replaces.
        """
        text = self._render((Message("user", _PROBE), Message("assistant", _PROBE)))
        after = text[text.rfind(_PROBE) + len(_PROBE) :]
        found = [piece for piece in _split(after, self._controls) if piece in self._controls]
        return (found[0], None) if found else (self._files.eos, after)


def _split(text: str, tokens: Iterable[str]) -> list[str]:
    """Cuts a text at special tokens; the tokens stay, as pieces of their own."""
    pieces = [text]
    for token in sorted(tokens, key=len, reverse=True):
        pieces = [part for piece in pieces for part in ([piece] if piece in tokens else _cut(piece, token))]
    return pieces


def _cut(text: str, token: str) -> list[str]:
    pieces = text.split(token)
    joined = [part for piece in pieces for part in (piece, token)][:-1]
    return [part for part in joined if part]


@lru_cache(maxsize=1)
def _toy() -> Tokenizer:
    return Tokenizer(TokenizerFiles(train_tokenizer(), eos=EOS, pad=PAD), TOY_TEMPLATE)
