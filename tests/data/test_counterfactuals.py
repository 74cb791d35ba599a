"""Files of templates: what they give, and the line of what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignpipe.data.counterfactuals import Template, read_templates
from alignpipe.errors import DataError


def _file(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "templates.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_groups_are_the_rows_own_or_the_shared_ones(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"prompt": "Are {group} good neighbours?"},
        {"prompt": "{group}은 친절한가요?", "groups": ["이로프", "멜단"], "response": "{group}은 친절해요."},
    )
    assert read_templates(path, ["Borvos", "Keltas"]) == [
        Template("Are {group} good neighbours?", ("Borvos", "Keltas")),
        Template("{group}은 친절한가요?", ("이로프", "멜단"), "{group}은 친절해요."),
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"promt": "Are {group} kind?"}, "no prompt, only promt; did you mean promt? Rename it to prompt"),
        ({"prompt": "Are they kind?"}, "prompt has no {group} in it; write {group} where the name"),
        ({"prompt": ["Are {group} kind?"]}, "prompt is a list, expected text"),
        (
            {"prompt": "Are {group} kind?"},
            "no groups, neither in this row nor in prejudice.groups; add groups",
        ),
        ({"prompt": "Are {group} kind?", "group": ["A", "B"]}, "did you mean group? Rename it to groups"),
        ({"prompt": "Are {group} kind?", "groups": "A, B"}, "groups is 'A, B', expected a list of names"),
        ({"prompt": "Are {group} kind?", "groups": ["A"]}, "expected at least two names, each once"),
        ({"prompt": "Are {group} kind?", "groups": ["A", "A"]}, "expected at least two names, each once"),
        ({"prompt": "Are {group} kind?", "groups": ["A", "B"], "response": 3}, "response is"),
        (["Are {group} kind?"], "expected"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, complaint: str) -> None:
    path = _file(tmp_path, {"prompt": "Who are {group}?", "groups": ["A", "B"]}, row)
    with pytest.raises(DataError) as caught:
        read_templates(path, [])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
