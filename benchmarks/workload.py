"""Models and rows of a benchmark: `build` writes them to a folder, the other functions read them back.

GSM8K and hh pairs, or the embedded world -> tokenizer, random models, rows as text for us and as ids for the peers

The same arguments write the same files.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from alignpipe.data.records import Message, RecordType
from alignpipe.data.template import NAMED, ChatTemplate
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.data.tokenizer_files import TokenizerFiles
from alignpipe.data.tokenizer_files import write_tokenizer as write_files
from alignpipe.toy.tokenizer import EOS, PAD, SPECIAL_TOKENS
from benchmarks.case import MAX_LENGTH, SEED, SIZES, Size, with_rows

DEMONSTRATIONS, PAIRS, QUESTIONS, IDS = "demonstrations.jsonl", "pairs.jsonl", "questions.jsonl", "ids.json"
POLICY, REWARD = "policy", "reward"
# What the tokenizer is trained on, and what rows are chosen from.
NUM_TEXTS = 2000
LONG_PROMPTS = (80, 400)


def build(folder: Path, size: Size, data: Path | None, template: str) -> None:
    """Write everything that the cases of one size read.

    Args:
        folder: empty.
        size: of the models; decides the vocabulary too, and so which rows fit.
        data: holds `gsm8k_train.jsonl` and `hh_harmless_pairs.jsonl`; None takes the embedded world.
        template: `alpaca`, with which all rows begin alike, or `plain`.
    """
    demonstrations, pairs = _embedded() if data is None else _read(data)
    # As the template renders them, so that its own words are tokens too.
    rendered = ChatTemplate(NAMED[template])
    turns = [
        [Message("user", row["prompt"]), Message("assistant", row["response"])] for row in demonstrations
    ]
    texts = [rendered.render(messages, eos_token="") for messages in turns]
    texts += [text for row in pairs for text in row.values()]
    write_tokenizer(folder / POLICY, texts, size.vocabulary, NAMED[template])
    tokenizer = Tokenizer.load(folder / POLICY, NAMED[template])
    _write_models(folder, size, tokenizer)
    _write_lines(folder / DEMONSTRATIONS, demonstrations)
    _write_lines(folder / PAIRS, pairs)
    rows = _demonstrations(folder / DEMONSTRATIONS, tokenizer)
    prompts = [row["ids"][: row["mask"].index(True)] for row in rows]
    _write_lines(folder / QUESTIONS, _lines(folder / DEMONSTRATIONS)[: size.questions])
    stream = cycle(token for row in rows for token in row["ids"])
    ids = {
        "demonstrations": _first(folder / DEMONSTRATIONS, rows, size.rows),
        "pairs": _first(folder / PAIRS, _pairs(folder / PAIRS, tokenizer), size.pairs),
        "questions": prompts[: size.questions],
        "mixed": prompts[: size.prompts],
        **{str(length): _cut(stream, length, size.questions) for length in LONG_PROMPTS},
    }
    (folder / IDS).write_text(json.dumps(ids))


def ids_of(folder: Path, name: str) -> list[Any]:
    """Token ids: `demonstrations` {ids, mask}, `pairs` {prompt, chosen, rejected}, the others lists of prompts."""
    return list(json.loads((folder / IDS).read_text())[name])


def num_tokens(folder: Path, name: str) -> int:
    """Tokens that one repetition over `demonstrations` or `pairs` is worth: a pair is two sequences."""
    rows = ids_of(folder, name)
    if name == "demonstrations":
        return sum(len(row["ids"]) for row in rows)
    return sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)


def stop_ids(size: Size, every: int | None) -> list[int]:
    """One token in so many, so that a random model's responses end after as many on average; none for None."""
    return [] if every is None else list(range(every - 1, size.vocabulary, every))


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int, template: str) -> None:
    """Train a byte-level BPE of exactly so many entries; the same texts give the same one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    # A small world has fewer merges than the model has rows.
    found.add_tokens([f"<unused{index}>" for index in range(vocabulary - found.get_vocab_size())])
    folder.mkdir(parents=True, exist_ok=True)
    write_files(TokenizerFiles(found, eos=EOS, pad=PAD), template, folder)


def _read(data: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Demonstrations and preferences of public data."""
    rows = [
        {"prompt": row["question"], "response": row["answer"]} for row in _lines(data / "gsm8k_train.jsonl")
    ]
    pairs = _lines(data / "hh_harmless_pairs.jsonl")
    return rows[:NUM_TEXTS], pairs[:NUM_TEXTS]


def _embedded() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The same of the embedded world, whose rows are short."""
    from alignpipe.toy.answers import demonstrate, make_demonstrations

    found = make_demonstrations(NUM_TEXTS, SEED, quality=1.0)
    rows = [{"prompt": prompt, "response": response} for prompt, response in found]
    pairs = [
        {"prompt": prompt, "chosen": good, "rejected": demonstrate(prompt, SEED + 1, index, 0.0)}
        for index, (prompt, good) in enumerate(found)
    ]
    return rows, [row for row in pairs if row["chosen"] != row["rejected"]]


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_models(folder: Path, size: Size, tokenizer: Tokenizer) -> None:
    """A random policy, and the reward model that the rm stage begins with."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignpipe.models.loading import ModelSource
    from alignpipe.models.saving import save_model
    from alignpipe.models.scalar_head import load_scalar_model

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2 * MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder / POLICY)
    start = load_scalar_model(ModelSource(str(folder / POLICY)), tokenizer, seed=SEED)
    save_model(start, tokenizer, folder / REWARD)


def _demonstrations(path: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Ids of the rows as the sft stage makes them; the file keeps those that fit."""
    from alignpipe.data.encoding import encode_demonstrations

    records = _records(path, "demonstrations")
    found = encode_demonstrations(records, tokenizer, MAX_LENGTH, "drop")
    kept = [records[index] for index in found.kept]
    _write_lines(path, [{"prompt": row.messages[0].content, "response": row.response} for row in kept])
    return [{"ids": row.ids, "mask": row.mask} for row in found.examples]


def _pairs(path: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Ids of the pairs as the rm and dpo stages make them; the file keeps those that fit."""
    from alignpipe.data.encoding import encode_rankings

    records = _records(path, "rankings")
    found = encode_rankings(records, tokenizer, MAX_LENGTH, "drop")
    lines = []
    for index in found.kept:
        prompt = [{"role": turn.role, "content": turn.content} for turn in records[index].prompt]
        chosen, rejected = records[index].responses
        lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    _write_lines(path, lines)
    ids = []
    for row in found.examples:
        start, (chosen, rejected) = row.prompt_length, row.examples
        sides = {"chosen": chosen.ids[start:], "rejected": rejected.ids[start:]}
        ids.append({"prompt": chosen.ids[:start], **sides})
    return ids


def _records(path: Path, kind: RecordType) -> list[Any]:
    from alignpipe.compose.composition import compose
    from alignpipe.data.sources import DataSource, read_records

    config = compose(["stage=sft", f"data='{path}'"]).config.data
    return read_records(DataSource("file", str(path), config), kind).records


def _first(path: Path, ids: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Cut the file to its first rows, and return their ids."""
    _write_lines(path, _lines(path)[:count])
    return ids[:count]


def _cut(stream: Iterator[int], length: int, count: int) -> list[list[int]]:
    """Prompts of one length."""
    return [list(islice(stream, length)) for _ in range(count)]


def main() -> None:
    """Build by the command line, so that the process which compares never holds a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--template", choices=NAMED, required=True)
    given = parser.parse_args()
    build(given.folder, with_rows(SIZES[given.size], given.rows), given.data, given.template)


if __name__ == "__main__":
    main()
