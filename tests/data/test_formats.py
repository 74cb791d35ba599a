"""Formats: what a row of each becomes, and which rows of each are bad."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignpipe.config import DataConfig
from alignpipe.data.records import Demonstration, Message, Prompt, Ranking, Text, Unpaired
from alignpipe.data.sources import detect_format, find_source, read_records, readable_types
from alignpipe.errors import DataError

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
Write, Config = Callable[[str, Any], Path], Callable[..., DataConfig]


@pytest.fixture
def read(write: Write, config: Config) -> Callable[..., Any]:
    """Reads rows as records of the wanted type."""

    def read_rows(rows: list[dict[str, Any]], want: str, max_bad: float = 0.0, **changes: Any) -> Any:
        source = find_source(str(write("rows.jsonl", rows)), config(max_bad=max_bad, **changes))
        return read_records(source, want)  # type: ignore[arg-type]

    return read_rows


HH = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Bye\n\nAssistant:"
TALK = [{"role": "user", "content": "Hello"}]
SAID = [{"role": "assistant", "content": "Hi"}]
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "alpaca": (
        "alpaca",
        {"instruction": "Sum", "input": "Text", "output": "T."},
        Demonstration((Message("user", "Sum", "Text"), A("T."))),
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Sum", "input": " ", "output": "T."},
        Demonstration((U("Sum"), A("T."))),
    ),
    "alpaca with system": (
        "alpaca",
        {"instruction": "Sum", "output": "T.", "system": "Be good."},
        Demonstration((S("Be good."), U("Sum"), A("T."))),
    ),
    "messages": ("messages", {"messages": TALK + SAID}, Demonstration((U("Hello"), A("Hi")))),
    "messages in parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "He"}, {"text": "llo"}]}, *SAID]},
        Demonstration((U("Hello"), A("Hi"))),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be good."},
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hi"},
            ]
        },
        Demonstration((S("Be good."), U("Hello"), A("Hi"))),
    ),
    "prompt and completion": (
        "prompt_completion",
        {"prompt": "Hello", "completion": "Hi"},
        Demonstration((U("Hello"), A("Hi"))),
    ),
    "question and answer": (
        "prompt_completion",
        {"question": "Hello", "answer": "Hi"},
        Demonstration((U("Hello"), A("Hi"))),
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": TALK, "completion": SAID},
        Demonstration((U("Hello"), A("Hi"))),
    ),
    "pair": (
        "preference",
        {"prompt": "Hello", "chosen": "Hi", "rejected": "No"},
        Ranking((U("Hello"),), ("Hi", "No"), (1, 2)),
    ),
    "pair as messages": (
        "preference",
        {"prompt": TALK, "chosen": SAID, "rejected": [{"role": "assistant", "content": "No"}]},
        Ranking((U("Hello"),), ("Hi", "No"), (1, 2)),
    ),
    "pair of whole dialogues beside a prompt": (
        "preference",
        {
            "prompt": "Hello",
            "chosen": TALK + SAID,
            "rejected": [*TALK, {"role": "assistant", "content": "No"}],
        },
        Ranking((U("Hello"),), ("Hi", "No"), (1, 2)),
    ),
    "implicit pair": (
        "preference",
        {"chosen": TALK + SAID, "rejected": [*TALK, {"role": "assistant", "content": "No"}]},
        Ranking((U("Hello"),), ("Hi", "No"), (1, 2)),
    ),
    "hh pair": (
        "preference",
        {"chosen": HH + " Bye!", "rejected": HH + " No\n"},
        Ranking((U("Hello"), A("Hi"), U("Bye")), ("Bye!", "No"), (1, 2)),
    ),
    "hh prompt": (
        "preference",
        {"prompt": HH, "chosen": "Bye!", "rejected": "No"},
        Ranking((U("Hello"), A("Hi"), U("Bye")), ("Bye!", "No"), (1, 2)),
    ),
    "ranked": (
        "ranked",
        {"prompt": "Hello", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "gold": [0.1, 0.9, 0.2]},
        Ranking((U("Hello"),), ("a", "b", "c"), (2, 1, 2), (0.1, 0.9, 0.2)),
    ),
    "ranked from zero": (
        "ranked",
        {"prompt": TALK, "responses": ["a", "b"], "ranks": [1, 0]},
        Ranking((U("Hello"),), ("a", "b"), (2, 1)),
    ),
    "best first": (
        "ranked",
        {"prompt": "Hello", "responses": ["a", "b", "c"]},
        Ranking((U("Hello"),), ("a", "b", "c"), (1, 2, 3)),
    ),
    "nemo": (
        "ranked",
        {
            "context": TALK,
            "completions": [
                {"rank": 1, "completion": [{"role": "assistant", "content": "No"}]},
                {"rank": 0, "completion": SAID},
            ],
        },
        Ranking((U("Hello"),), ("No", "Hi"), (2, 1)),
    ),
    "prompts": ("prompts", {"prompt": "Hello", "id": 3}, Prompt((U("Hello"),))),
    "text": ("text", {"text": "Once upon a time."}, Text("Once upon a time.")),
}
NATIVE = {"preference": "rankings", "ranked": "rankings", "prompts": "prompts", "text": "text"}


@pytest.mark.parametrize("case", CASES)
def test_read_known_row_is_the_record(
    case: str, read: Callable[..., Any], write: Write, config: Config
) -> None:
    layout, row, expected = CASES[case]
    source = find_source(str(write("one.jsonl", [row])), config())
    assert detect_format(source) == layout
    want = NATIVE.get(layout, "demonstrations")
    assert want in readable_types(source)
    assert read([row], want).records == [expected]
    if want != "text":
        assert read([row], "prompts").records == [Prompt(expected.prompt)]


def test_read_ranking_as_demonstration_takes_the_best(read: Callable[..., Any]) -> None:
    row = {"prompt": "Hello", "responses": ["a", "b", "c"], "ranks": [2, 1, 1]}
    assert read([row], "demonstrations").records == [Demonstration((U("Hello"), A("b")))]


def test_read_conversation_that_waits_is_a_prompt(read: Callable[..., Any]) -> None:
    row = {"messages": [*TALK, *SAID, {"role": "user", "content": "Bye"}]}
    assert read([row], "prompts").records == [Prompt((U("Hello"), A("Hi"), U("Bye")))]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the conversation ends with the user"):
        read([row], "demonstrations")


def test_read_hh_text_with_the_marker_inside_a_turn_joins_it(read: Callable[..., Any]) -> None:
    shared = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    (record,) = read([{"chosen": shared + " x", "rejected": shared + " y"}], "rankings").records
    assert record.prompt == (U("a"), A("b\n\nc"), U("d"))


BAD = {
    "output is empty": {"instruction": "x", "output": " \n"},
    "output is null, expected text": {"instruction": "x", "output": None},
    "output is a number, expected text": {"instruction": "x", "output": 5},
    "input is a list, expected text": {"instruction": "x", "input": ["y"], "output": "z"},
    "instruction holds a NUL character": {"instruction": "x\0", "output": "y"},
    "instruction holds a lone surrogate, half a character": {"instruction": "\ud800", "output": "y"},
    "instruction is null, expected text": {"output": "y"},
    "messages is an empty list": {"messages": []},
    "messages is text, expected a list": {"messages": "x"},
    "messages[1] is text, expected an object with role and content": {"messages": ["x"]},
    "messages[1] has role 'tool', expected system, user or assistant": {
        "messages": [{"role": "tool", "content": "x"}]
    },
    "messages[1] (user) is empty": {"messages": [{"role": "user", "content": ""}, *SAID]},
    "messages: user after user": {"messages": TALK + TALK + SAID},
    "messages: assistant comes first, expected user": {"messages": SAID},
    "messages: assistant after system": {"messages": [{"role": "system", "content": "x"}, *SAID]},
    "messages: has no user turn": {"messages": [{"role": "system", "content": "x"}]},
    "chosen and rejected are equal": {"prompt": "x", "chosen": "a ", "rejected": "a"},
    "rejected is empty": {"prompt": "x", "chosen": "a", "rejected": ""},
    "prompt is empty": {"prompt": " ", "chosen": "a", "rejected": "b"},
    "chosen and rejected differ in their prompt": {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: c\n\nAssistant: d",
    },
    "the shared prompt: a user turn is empty": {
        "chosen": "\n\nHuman: \n\nAssistant: b",
        "rejected": "\n\nHuman: \n\nAssistant: d",
    },
    "chosen ends with user, expected assistant": {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
    "rejected has no prompt before the response": {"chosen": TALK + SAID, "rejected": SAID},
    "responses holds 1, expected 2 to 9 responses": {"prompt": "x", "responses": ["a"]},
    "responses holds 10, expected 2 to 9 responses": {"prompt": "x", "responses": list("abcdefghij")},
    "responses holds fewer than 2 that differ": {"prompt": "x", "responses": ["a", "a "]},
    "ranks holds 3, expected 2, one a response": {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2, 3]},
    "ranks holds 'True', expected a number": {"prompt": "x", "responses": ["a", "b"], "ranks": [1, True]},
    "responses[2] is null, expected text": {"prompt": "x", "responses": ["a", None]},
    "prompt ends with the assistant, expected the user": {"prompt": TALK + SAID, "responses": ["a", "b"]},
    "text is empty": {"text": ""},
}
GOOD: list[dict[str, Any]] = [
    {"instruction": "x", "output": "y"},
    {"messages": TALK + SAID},
    {"chosen": TALK + SAID, "rejected": [*TALK, {"role": "assistant", "content": "No"}]},
    {"prompt": "x", "chosen": "a", "rejected": "b"},
    {"prompt": "x", "responses": ["a", "b"]},
    {"text": "x"},
]


@pytest.mark.parametrize("reason", BAD)
def test_read_bad_row_is_rejected_with_its_line(reason: str, read: Callable[..., Any]) -> None:
    row = BAD[reason]
    shared = max(GOOD, key=lambda good: (len(good.keys() & row.keys()), -len(good)))
    want = (
        "text" if "text" in row else "rankings" if {"chosen", "responses"} & row.keys() else "demonstrations"
    )
    found = read([shared, row, shared], want, max_bad=0.5)
    assert [(bad.line, bad.reason) for bad in found.rejected] == [(2, reason)]
    assert len(found.records) == 2
    with pytest.raises(DataError) as error:
        read([shared, row, shared], want, max_bad=0.33)
    assert f"rows.jsonl:2: {reason}. 1 of 3 rows cannot be used, more than data.max_bad=0.33" in str(
        error.value
    )


def test_columns_named_by_the_user_are_read(read: Callable[..., Any]) -> None:
    row = {"q": "x", "a": "y", "prompt": 5}
    named = {"prompt": "q", "response": "a"}
    assert read([row], "demonstrations", columns=named).records == [Demonstration((U("x"), A("y")))]


def test_columns_named_but_absent_gives_the_nearest(read: Callable[..., Any]) -> None:
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: data\.columns\.prompt=qestion .*did you mean question\?"
    ):
        read([{"question": "x", "answer": "y"}], "prompts", columns={"prompt": "qestion"})


def test_columns_that_the_first_row_lacks_are_read_in_later_rows(read: Callable[..., Any]) -> None:
    rows = [
        {"prompt": "x", "responses": ["a", "b"]},
        {"prompt": "x", "responses": ["a", "b"], "ranks": [2, 1]},
    ]
    assert [record.ranks for record in read(rows, "rankings").records] == [(1, 2), (2, 1)]
    rows = [
        {"instruction": "x", "output": "y"},
        {"instruction": "x", "input": "z", "output": "y", "system": "s"},
    ]
    assert read(rows, "prompts").records[1].prompt == (S("s"), Message("user", "x", "z"))


def test_columns_unknown_says_have_need_and_mend(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError) as error:
        read([{"q": "x", "answer": "y"}], "demonstrations")
    assert "It has the columns q, answer" in str(error.value)
    assert "prompt and response" in str(error.value)
    assert str(error.value).endswith("name yours with data.columns.prompt=...")


def test_format_that_lacks_columns_says_which(read: Callable[..., Any]) -> None:
    with pytest.raises(
        DataError, match=r"format alpaca lacks instruction\. .* set data\.columns\.instruction=\.\.\."
    ):
        read([{"question": "x", "answer": "y"}], "demonstrations", format="alpaca")


def test_format_pairs_of_plain_text_without_prompt_are_refused(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"lacks prompt.*data\.columns\.prompt"):
        read([{"chosen": "x", "rejected": "y"}], "rankings")


def test_format_explicit_wins_over_columns(read: Callable[..., Any]) -> None:
    row = {"prompt": "Hello", "answer": "Hi", "text": "Once."}
    assert read([row], "text", format="text").records == [Text("Once.")]
    assert read([row], "prompts", format="prompts").records == [Prompt((U("Hello"),))]


def test_read_type_that_the_format_lacks_says_what_it_gives(read: Callable[..., Any]) -> None:
    with pytest.raises(
        DataError, match="format alpaca, which gives demonstrations, prompts; rankings are wanted"
    ):
        read([GOOD[0]], "rankings")


def test_max_rows_takes_the_first(read: Callable[..., Any]) -> None:
    found = read([{"text": str(number)} for number in range(9)], "text", max_rows=3)
    assert (found.num_rows, [record.text for record in found.records]) == (3, ["0", "1", "2"])


def test_unpaired_rows_say_of_each_response_whether_it_is_good(read: Callable[..., Any]) -> None:
    rows = [
        {"prompt": "Hello", "completion": "Hi", "label": True},
        {"prompt": TALK, "completion": SAID, "label": False},
    ]
    found = read(rows, "unpaired")
    assert found.format == "unpaired"
    assert found.records == [Unpaired((U("Hello"),), "Hi", True), Unpaired((U("Hello"),), "Hi", False)]
    assert read(rows, "prompts").records == [Prompt((U("Hello"),))] * 2
    with pytest.raises(DataError, match="gives prompts, unpaired; demonstrations are wanted"):
        read(rows, "demonstrations")


def test_column_called_label_makes_rows_unpaired_only_where_it_is_true_or_false(
    read: Callable[..., Any],
) -> None:
    rows = [{"prompt": "Hello", "completion": "Hi", "label": "greeting"}]
    assert read(rows, "demonstrations").format == "prompt_completion"
    with pytest.raises(DataError, match="label is 'greeting', expected true or false"):
        read(rows, "unpaired", format="unpaired")
    good = [{"prompt": "Hello", "completion": "Hi", "label": text} for text in ("true", "0", 1, "False")]
    desirable = [record.desirable for record in read(good, "unpaired", format="unpaired").records]
    assert desirable == [True, False, True, False]
