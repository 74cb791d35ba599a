"""Encoding: prompts are prefixes, masks cover the response, what is too long is cut, dropped or an error."""

from dataclasses import replace

import pytest

from alignpipe.data.encoding import (
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_texts,
    encode_unpaired,
)
from alignpipe.data.records import Demonstration, Message, Prompt, Ranking, Text, Unpaired
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError

TOKENIZER = Tokenizer.toy()
ASK = Message("user", "What color is the sky?")
SHORT = Demonstration((ASK, Message("assistant", "Blue.")))
LONG = Demonstration((ASK, Message("assistant", "The sky is blue. " * 10)))
RANKING = Ranking((ASK,), ("Red.", "Blue.", "Green. " * 20), (2.0, 1.0, 3.0), (0.1, 0.9, 0.0))
PROMPT = TOKENIZER.encode_prompt((ASK,))


def answer(text: str) -> list[int]:
    return TOKENIZER.encode_response((ASK,), text)


def test_encode_demonstrations_learns_the_response_alone() -> None:
    encoded = encode_demonstrations([SHORT], TOKENIZER, 100, "drop")
    (example,) = encoded.examples
    assert example.ids == PROMPT + answer("Blue.")
    assert example.mask == [False] * len(PROMPT) + [True] * len(answer("Blue."))
    assert (encoded.num_overflow, encoded.kept) == (0, [0])


def test_encode_demonstrations_loss_on_all_learns_all_but_the_first() -> None:
    (example,) = encode_demonstrations([SHORT], TOKENIZER, 100, "drop", "all").examples
    assert example.mask == [False] + [True] * (len(example.ids) - 1)


TURNS = Demonstration(
    (
        ASK,
        Message("assistant", "Blue."),
        Message("user", "And the grass?"),
        Message("assistant", "Green, of course."),
    )
)


def test_encode_demonstrations_loss_on_last_learns_the_last_turn_with_its_end() -> None:
    (all_turns,) = encode_demonstrations([TURNS], TOKENIZER, 100, "drop").examples
    (last,) = encode_demonstrations([TURNS], TOKENIZER, 100, "drop", "last").examples
    response = TOKENIZER.encode_response(TURNS.prompt, "Green, of course.")
    assert last.ids == all_turns.ids
    assert last.mask == [False] * (len(last.ids) - len(response)) + [True] * len(response)
    assert last.ids[-1] == TOKENIZER.turn_end_id
    # Two turns are learnt otherwise, each with its end.
    learnt = [token for token, mask in zip(all_turns.ids, all_turns.mask, strict=True) if mask]
    assert learnt.count(TOKENIZER.turn_end_id) == 2
    assert learnt == [*answer("Blue."), *response]


@pytest.mark.parametrize("loss_on", ["response", "last", "all"])
@pytest.mark.parametrize("max_length", range(2, 60))
def test_encode_demonstrations_cut_always_leaves_something_to_learn(loss_on: str, max_length: int) -> None:
    examples = encode_demonstrations([SHORT, LONG, TURNS], TOKENIZER, max_length, "cut", loss_on).examples
    assert len(examples) == 3
    for example in examples:
        assert example.num_items > 0 and not example.mask[0]
        assert len(example.ids) == len(example.mask) <= max_length


def test_encoded_figures_tell_cut_from_dropped() -> None:
    dropped = encode_demonstrations([LONG, SHORT, LONG], TOKENIZER, 30, "drop")
    assert dropped.figures == {"rows_cut": 0, "rows_dropped": 2}
    cut = encode_demonstrations([LONG, SHORT, LONG], TOKENIZER, 30, "cut")
    assert cut.figures == {"rows_cut": 2, "rows_dropped": 0}
    # A ranking that loses its long response is cut, one that has no two left is dropped.
    pair = Ranking((ASK,), ("Blue.", "Green. " * 20), (1.0, 2.0))
    assert encode_rankings([RANKING, pair], TOKENIZER, 30, "drop").figures == {
        "rows_cut": 1,
        "rows_dropped": 1,
    }


def test_encode_demonstrations_drop_counts_and_tells_which_are_kept() -> None:
    encoded = encode_demonstrations([LONG, SHORT, LONG], TOKENIZER, 30, "drop")
    assert (len(encoded.examples), encoded.num_overflow, encoded.kept) == (1, 2, [1])


def test_encode_demonstrations_exact_length_is_not_over() -> None:
    length = len(PROMPT + answer("Blue."))
    assert encode_demonstrations([SHORT], TOKENIZER, length, "error").num_overflow == 0
    with pytest.raises(DataError):
        encode_demonstrations([SHORT], TOKENIZER, length - 1, "error")


def test_encode_demonstrations_cut_takes_the_prompt_first_from_the_left() -> None:
    response = answer("Blue.")
    (example,) = encode_demonstrations([SHORT], TOKENIZER, len(response) + 3, "cut").examples
    assert example.ids == PROMPT[-3:] + response
    assert example.mask == [False] * 3 + [True] * len(response)


@pytest.mark.parametrize("max_length", [2, 3, 10])
def test_encode_demonstrations_cut_leaves_a_learnt_token(max_length: int) -> None:
    encoded = encode_demonstrations([LONG, SHORT], TOKENIZER, max_length, "cut")
    assert encoded.num_overflow == 2
    for example in encoded.examples:
        assert 2 <= len(example.ids) == len(example.mask) <= max_length
        assert any(example.mask)
        assert not example.mask[0]
    assert encoded.examples[0].ids == PROMPT[-1:] + answer("The sky is blue. " * 10)[: max_length - 1]


def test_encode_demonstrations_error_names_row_length_and_key() -> None:
    with pytest.raises(
        DataError, match=r"row 2 .*What color.* has \d+ tokens, more than max_length=30; raise max_le"
    ):
        encode_demonstrations([SHORT, LONG], TOKENIZER, 30, "error")


def test_encode_demonstrations_none_left_names_the_lengths() -> None:
    length = len(PROMPT) + len(answer("Blue."))
    with pytest.raises(
        DataError,
        match=f"left of 1 rows of {length} to {length} tokens within max_length=5; raise max_length or set",
    ):
        encode_demonstrations([SHORT], TOKENIZER, 5, "drop")
    assert encode_demonstrations([], TOKENIZER, 5, "drop").examples == []


def test_encode_rankings_share_the_prompt_and_keep_the_order() -> None:
    (example,) = encode_rankings([RANKING], TOKENIZER, 500, "drop").examples
    assert [one.ids for one in example.examples] == [PROMPT + answer(text) for text in RANKING.responses]
    assert all(one.mask.index(True) == example.prompt_length == len(PROMPT) for one in example.examples)
    assert (example.ranks, example.gold) == (RANKING.ranks, RANKING.gold)


def test_encode_rankings_drop_takes_out_the_long_response() -> None:
    encoded = encode_rankings([RANKING], TOKENIZER, 40, "drop")
    assert encoded.examples[0].ranks == (2.0, 1.0)
    assert encoded.examples[0].gold == (0.1, 0.9)
    assert encoded.num_overflow == 1


def test_encode_rankings_fewer_than_two_left_drops_the_row() -> None:
    pair = Ranking((ASK,), ("Red.", "Green. " * 20), (1.0, 2.0))
    encoded = encode_rankings([pair, RANKING], TOKENIZER, 40, "drop")
    assert (encoded.kept, encoded.num_overflow) == ([1], 2)
    with pytest.raises(
        DataError,
        match=r"nothing is left of 1 rows .* within max_length=40; raise max_length or set data\.on_over",
    ):
        encode_rankings([pair], TOKENIZER, 40, "drop")


def test_encode_rankings_cut_gives_all_responses_the_same_prompt() -> None:
    longest = len(answer(RANKING.responses[2]))
    (example,) = encode_rankings([RANKING], TOKENIZER, longest + 2, "cut").examples
    assert example.prompt_length == 2
    assert all(one.ids[:2] == PROMPT[-2:] for one in example.examples)
    assert [one.ids[2:] for one in example.examples] == [answer(text) for text in RANKING.responses]


def test_encode_rankings_cut_that_makes_responses_equal_drops_the_row() -> None:
    alike = Ranking((ASK,), ("The sky is blue and wide.", "The sky is blue and low."), (1.0, 2.0))
    with pytest.raises(DataError, match=r"within max_length=4; raise max_length$"):
        encode_rankings([alike], TOKENIZER, 4, "cut")


def test_encode_rankings_equal_responses_are_one_with_the_best_rank() -> None:
    ranking = Ranking((ASK,), ("Red.", "Blue.", "Red."), (3.0, 2.0, 1.0))
    (example,) = encode_rankings([ranking], TOKENIZER, 100, "drop").examples
    assert example.ranks == (2.0, 1.0)


def test_encode_rankings_all_tied_teaches_nothing_and_is_left_out() -> None:
    tied = replace(RANKING, ranks=(1.0, 1.0, 1.0))
    encoded = encode_rankings([tied, RANKING], TOKENIZER, 500, "drop")
    assert (encoded.kept, encoded.num_overflow) == ([1], 0)
    with pytest.raises(DataError, match="has two responses of different rank"):
        encode_rankings([tied], TOKENIZER, 500, "drop")


def test_encode_unpaired_is_a_ranking_of_one() -> None:
    records = [Unpaired((Message("user", "Hi."),), "Yes.", True), Unpaired((ASK,), "No. " * 40, False)]
    kept = encode_unpaired(records, TOKENIZER, 60, "drop")
    assert (kept.kept, kept.num_overflow, kept.examples[0].ranks) == ([0], 1, (1.0,))
    prompt, (response,) = TOKENIZER.encode_responses(records[0].prompt, ("Yes.",))
    assert kept.examples[0].examples[0].ids == prompt + response
    assert kept.examples[0].examples[0].mask == [False] * len(prompt) + [True] * len(response)
    cut = encode_unpaired(records, TOKENIZER, 60, "cut").examples[1]
    assert (cut.ranks, len(cut.examples[0].ids)) == ((2.0,), 60)
    assert cut.examples[0].mask.index(True) == cut.prompt_length


def test_encode_prompts_drop_and_cut_and_error() -> None:
    records = [Prompt((Message("user", "Hi."),)), Prompt((Message("user", "Hi. " * 30),))]
    short, long = (TOKENIZER.encode_prompt(record.messages) for record in records)
    dropped = encode_prompts(records, TOKENIZER, 20, "drop")
    assert (dropped.examples, dropped.kept, dropped.num_overflow) == ([short], [0], 1)
    assert encode_prompts(records, TOKENIZER, 20, "cut").examples == [short, long[-20:]]
    with pytest.raises(DataError, match="more than max_prompt_length=20"):
        encode_prompts(records, TOKENIZER, 20, "error")


def test_encode_texts_each_token_is_learnt_once_and_eos_ends() -> None:
    documents = [Text("The sky is blue and the sea is blue. " * 5), Text("Hi")]
    encoded = encode_texts(documents, TOKENIZER, 8)
    for index, document in enumerate(documents):
        windows = [example for example, of in zip(encoded.examples, encoded.kept, strict=True) if of == index]
        whole = [*TOKENIZER.encode_text(document.text), TOKENIZER.eos_id]
        learnt = [token for one in windows for token, on in zip(one.ids, one.mask, strict=True) if on]
        assert windows[0].ids[:1] + learnt == whole
        assert all(2 <= len(one.ids) <= 8 for one in windows)
    assert encoded.num_overflow == 0


def test_encode_cut_keeps_bos(model_folder) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load(
        model_folder("<s>", "</s>", adds_bos=True, bos_token="<s>", eos_token="</s>"),
        "{{ messages[0].content }}",
    )
    (ids,) = encode_prompts([Prompt((ASK,))], tokenizer, 6, "cut").examples
    assert ids == [tokenizer.bos_id, *tokenizer.encode_prompt((ASK,))[-5:]]
