"""What processes tell each other, on two real ones."""

import pytest

from alignpipe import processes
from alignpipe.errors import DataError
from tests.group import Group

CASES = "tests.launch.cases"


@pytest.mark.parametrize("lengths", [[5], [3, 1], [9, 2, 7, 7, 1], list(range(40)), [4] * 7])
def test_items_are_dealt_once_each_and_evenly(group: Group, lengths: list[int]) -> None:
    first, second = group.call(CASES, "dealt", lengths=lengths)
    assert sorted(first + second) == list(range(len(lengths)))
    assert abs(len(first) - len(second)) <= 1
    tokens = [sum(lengths[index] for index in part) for part in (first, second)]
    assert abs(tokens[0] - tokens[1]) <= max(lengths)
    for part in (first, second):
        assert [lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True)


@pytest.mark.parametrize("numbers", [[], [3], [5, 1, 4, 2, 3]])
def test_results_come_back_in_order_on_both(group: Group, numbers: list[int]) -> None:
    assert group.call(CASES, "spread_squares", numbers=numbers) == [[n * n for n in numbers]] * 2


def test_figures_are_added_up_where_one_lacks_some(group: Group) -> None:
    parts = [{"loss": (2.0, 4.0), "accuracy": (1.0, 1.0)}, {"loss": (3.0, 2.0)}]
    total = {"loss": (5.0, 6.0), "accuracy": (1.0, 1.0)}
    assert group.call(CASES, "summed", figures=parts) == [total, total]


@pytest.mark.parametrize("flags", [[False, False], [True, False], [False, True]])
def test_one_flag_is_everybodys_flag(group: Group, flags: list[bool]) -> None:
    assert group.call(CASES, "any_of", flags=flags) == [any(flags)] * 2


def test_what_the_first_finds_all_get(group: Group) -> None:
    assert group.call(CASES, "main_rank") == [0, 0]


def test_error_of_the_first_is_everybodys_error(group: Group) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: broken"):
        group.call(CASES, "failing_main")


def test_rows_of_a_tensor_are_put_together(group: Group) -> None:
    assert group.call(CASES, "added", rows=[7, 5, 9, 1]) == [[7.0, 5.0, 9.0, 1.0]] * 2


def test_one_process_needs_no_group() -> None:
    assert (processes.count(), processes.rank()) == (1, 0)
    assert processes.spread([2, 9, 4], lambda places: places) == [0, 1, 2]
    assert processes.deal([2, 9, 4]) == [1, 2, 0]
