"""Templates: byte for byte what the sources say and what transformers renders."""

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from alignpipe.data.records import Message
from alignpipe.data.template import ALPACA, PLAIN, TOY_TEMPLATE, ChatTemplate, find_template
from alignpipe.errors import CheckpointError, ConfigError

ASK, SAY, MORE = Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Bye")
CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message.role != 'system' %}\n"
    "<|im_start|>system\nBe good.<|im_end|>\n"
    "    {% endif %}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}"
    "<|im_start|>assistant\n{{ message.content | trim }}<|im_end|>{% endgeneration %}\n"
    "    {% else %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "    {% endif %}\n"
    "    {% if message.content == 'stop' %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{{ messages | tojson }}{{ namespace(a=1).a }}"
)


def test_alpaca_without_input_is_the_stanford_prompt() -> None:
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHello\n\n### Response:"
    )
    assert ChatTemplate(ALPACA).render([ASK], True, "<s>", "</s>") == expected
    assert ChatTemplate(ALPACA).render([ASK, SAY], False, "<s>", "</s>") == expected + "Hi</s>"


def test_alpaca_with_input_is_the_stanford_prompt() -> None:
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nHello\n\n### "
        "Input:\n"
        "World\n\n### Response:"
    )
    assert ChatTemplate(ALPACA).render([Message("user", "Hello", "World")], True, None, "</s>") == expected


def test_alpaca_more_turns_repeats_the_blocks() -> None:
    text = ChatTemplate(ALPACA).render([ASK, SAY, MORE], True, None, "</s>")
    assert text.endswith("### Response:Hi</s>\n\n### Instruction:\nBye\n\n### Response:")
    assert text.count("Below is an instruction") == 1


def test_alpaca_system_message_takes_the_place_of_the_opening() -> None:
    text = ChatTemplate(ALPACA).render([Message("system", "Be good."), ASK], True, None, "</s>")
    assert text == "Be good.\n\n### Instruction:\nHello\n\n### Response:"


def test_plain_is_as_documented() -> None:
    template = ChatTemplate(PLAIN)
    assert template.render([ASK], True, None, "</s>") == "### User:\nHello\n\n### Assistant:\n"
    assert template.render([Message("system", "Be good."), ASK, SAY, MORE], True, None, "</s>") == (
        "Be good.\n\n### User:\nHello\n\n### Assistant:\nHi</s>\n\n### User:\nBye\n\n### Assistant:\n"
    )


def test_plain_input_stands_below_the_content() -> None:
    text = ChatTemplate(PLAIN).render([Message("user", "Sum up.", "A text.")], False, None, "</s>")
    assert text == "### User:\nSum up.\n\nA text."


@pytest.mark.parametrize("source", [PLAIN, ALPACA, TOY_TEMPLATE, CHATML])
@pytest.mark.parametrize("open_turn", [True, False])
@pytest.mark.parametrize("messages", [[ASK], [ASK, SAY], [ASK, Message("assistant", " stop\n"), MORE]])
def test_render_any_template_equals_transformers(
    source: str, open_turn: bool, messages: list[Message]
) -> None:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    theirs, _ = render_jinja_template(
        [plain], chat_template=source, add_generation_prompt=open_turn, bos_token="<s>", eos_token="</s>"
    )
    assert ChatTemplate(source).render(messages, open_turn, "<s>", "</s>") == theirs[0]


def test_render_refused_conversation_is_one_line() -> None:
    template = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nhere') }}{% endif %}"
    )
    with pytest.raises(CheckpointError, match="refuses a conversation of system, user: no system here"):
        template.render([Message("system", "x"), ASK])


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_render_attack_on_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="refuses"):
        ChatTemplate(source).render([ASK])


def test_template_broken_jinja_names_the_line() -> None:
    with pytest.raises(CheckpointError, match="chat template line 2:"):
        ChatTemplate("a\n{% if %}")


def test_find_template_names_files_and_the_nearest_word(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"{{ messages }}\r\n")
    assert (find_template("plain"), find_template("alpaca")) == (PLAIN, ALPACA)
    assert find_template(str(path)) == "{{ messages }}\r\n"
    with pytest.raises(ConfigError, match="Did you mean alpaca"):
        find_template("alpacca")
