"""The world's tokenizer: any text comes back, special tokens are distinct, training is deterministic."""

import pytest
from tokenizers import Tokenizer

from alignpipe.toy.answers import make_demonstrations
from alignpipe.toy.tokenizer import ASSISTANT, EOS, PAD, SPECIAL_TOKENS, USER, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def test_train_tokenizer_round_trips_the_world_and_any_other_text(tokenizer: Tokenizer) -> None:
    texts = [text for pair in make_demonstrations(300, seed=9) for text in pair]
    for text in [*texts, "Grüße, 漢字 🙂!", "  two  spaces\n\ttab ", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_train_tokenizer_special_tokens_have_the_first_ids_and_are_never_split(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert tokenizer.encode(f"{USER}Hi.{ASSISTANT}Hello.{EOS}{PAD}").tokens[0] == USER
    assert not {0, 1, 2, 3} & set(tokenizer.encode("Hi. Who is Zorblax?").ids)


def test_train_tokenizer_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer().to_str() == tokenizer.to_str()
    assert train_tokenizer(seed=1).to_str() != tokenizer.to_str()


@pytest.mark.parametrize("vocab_size", [300, 512])
def test_train_tokenizer_has_the_size_asked_for(vocab_size: int) -> None:
    assert train_tokenizer(vocab_size).get_vocab_size() == vocab_size


def test_train_tokenizer_keeps_prompts_and_responses_short(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(text).ids) for pair in make_demonstrations(500, seed=2) for text in pair]
    assert sum(lengths) / len(lengths) < 16
