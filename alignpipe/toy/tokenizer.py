"""The embedded world's tokenizer: seed and size -> a byte-level BPE trained on the world's own text."""

from typing import TYPE_CHECKING

from alignpipe.toy.answers import make_demonstrations, make_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, EOS, USER, ASSISTANT = SPECIAL_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>")


def train_tokenizer(vocab_size: int = 640, seed: int = 0, num_texts: int = 4000) -> "Tokenizer":
    """Trains a byte-level BPE, so that every text can be encoded and comes back unchanged.

    The special tokens have the ids 0 to 3 in the order of `SPECIAL_TOKENS`. The same arguments give the same
    tokenizer.

    Args:
        vocab_size: Entries at most; 260 are taken by the bytes and special tokens.
        seed: Decides the texts.
        num_texts: How many demonstrations it learns from, and half as many documents.
    """
    from tokenizers import (  # noqa: PLC0415  the rest of the toy world needs only the standard library
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    texts = make_documents(num_texts // 2, seed)
    for prompt, response in make_demonstrations(num_texts, seed):
        texts += [prompt, response]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
