"""Chat templates: messages -> the text that a model reads, rendered as transformers renders them.

A template is a Jinja source with `messages`, `add_generation_prompt`, `bos_token` and `eos_token`. It comes
with a checkpoint, so it is untrusted: it runs in Jinja's immutable sandbox.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from alignpipe.data.records import Message, content_text
from alignpipe.errors import CheckpointError, ConfigError, did_you_mean

# The plain template, for models that come without one:
#
#     ### User:
#     Hello
#
#     ### Assistant:
#     Hi<eos>
#
# A system message stands before the first block, a blank line below it; later turns follow after a blank
# line. BOS is not in these templates: the tokenizer puts it before them if it uses one.
PLAIN = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '### Assistant:\\n' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'user' -%}{{- '### User:\\n' + message['content'] -}}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\n### Assistant:\\n' -}}{%- endif -%}"
)

# The two prompts of Stanford Alpaca, with and without an input. A system message takes the place of the
# opening sentence; later turns repeat the blocks.
ALPACA = (
    "{%- set opened = namespace(yes=false) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '\\n\\n### Response:' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] -}}{%- set opened.yes = true -%}"
    "{%- else -%}"
    "{%- if not opened.yes -%}"
    "{{- 'Below is an instruction that describes a task' -}}"
    "{%- if message['input'] -%}"
    "{{- ', paired with an input that provides further context' -}}"
    "{%- endif -%}"
    "{{- '. Write a response that appropriately completes the request.' -}}"
    "{%- set opened.yes = true -%}"
    "{%- endif -%}"
    "{{- '\\n\\n### Instruction:\\n' + message['content'] -}}"
    "{%- if message['input'] -%}{{- '\\n\\n### Input:\\n' + message['input'] -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\n### Response:' -}}{%- endif -%}"
)

# The embedded world's own; its four special tokens leave nothing else to write.
TOY_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<assistant>' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<user>' + message['content'] -}}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)

# What a sandboxed template can raise besides Jinja's own errors.
_FAULTS = (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RecursionError, MemoryError)
NAMED = {"plain": PLAIN, "alpaca": ALPACA}


class _Generation(jinja2.ext.Extension):
    """Reads `{% generation %}`, which marks assistant turns for transformers, and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it as a set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which models never see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: The Jinja source, byte for byte.
        takes_input: Whether it reads the `input` field of a message; else the input is set below the content.
    """

    def __init__(self, source: str) -> None:
        """Compiles `source`.

        Raises:
            CheckpointError: It is no valid Jinja.
        """
        self.source = source
        self.takes_input = re.search(r"""message\.input\b|\[\s*['"]input['"]\s*\]""", source) is not None
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"chat template line {error.lineno}: {error.message}; mend chat_template.jinja of the model, "
                "or "
                "remove it to use model.chat_template"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: Turns in order.
            add_generation_prompt: Whether to end with what opens the assistant's turn.
            bos_token: Text of the token that begins a sequence; None if the tokenizer has none.
            eos_token: Text of the token that ends one.

        Raises:
            CheckpointError: The template refuses the conversation.
        """
        # transformers passes only the tokens that exist; an absent one renders as nothing.
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            return self._template.render(
                messages=[self._plain(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{name: token for name, token in tokens.items() if token is not None},
            )
        except (jinja2.TemplateError, *_FAULTS) as error:
            roles = ", ".join(message.role for message in messages)
            raise CheckpointError(
                f"the model's chat template refuses a conversation of {roles}: "
                f"{' '.join(str(error).split())}; "
                "change the data's roles, or remove the template to use model.chat_template=plain"
            ) from error

    def _plain(self, message: Message) -> dict[str, str]:
        if message.input is None:
            return {"role": message.role, "content": message.content}
        if self.takes_input:
            return {"role": message.role, "content": message.content, "input": message.input}
        return {"role": message.role, "content": content_text(message)}


def find_template(name: str) -> str:
    """Returns the source that `model.chat_template` names.

    Args:
        name: `plain`, `alpaca`, or a file that holds a Jinja template.

    Raises:
        ConfigError: It is none of these, or the file is not UTF-8 text.
    """
    if name in NAMED:
        return NAMED[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"model.chat_template: {name!r} is no template and no file. {did_you_mean(name, NAMED)} "
            "Or give the path of a .jinja file"
        )
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.chat_template: {path} cannot be read: {error}; save it as UTF-8 text"
        ) from error
