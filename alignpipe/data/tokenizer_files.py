"""The files of a tokenizer: a model folder -> its vocabulary, special tokens, template; and back to a folder.

Which token pads is decided here: never one that ends a text, for then a model would not learn to stop.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from alignpipe.errors import CheckpointError

# Tokens that look like padding, best first; models reserve some that nothing else uses.
_PAD_NAMES = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|padding|>",
    "<pad_token>",
    "<|vision_pad|>",
    "<|endoftext|>",
)
_NEW_PAD = "<pad>"
# What transformers writes for "no limit".
_NO_LIMIT = int(1e30)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of a tokenizer say.

    Attributes:
        backend: The vocabulary and how text is cut.
        eos: Text of the token that ends a text.
        pad: Text of the token that fills batches.
        bos: Text of the token that begins a text, if there is one.
        unk: Text of the token for what cannot be encoded, if there is one.
        adds_bos: Whether `bos` is put before every text.
        pad_added: Whether `pad` is new in the vocabulary.
        template: Jinja source of the chat template, if there is one.
        max_length: `model_max_length` of the tokenizer.
    """

    backend: tokenizers.Tokenizer
    eos: str
    pad: str
    bos: str | None = None
    unk: str | None = None
    adds_bos: bool = False
    pad_added: bool = False
    template: str | None = None
    max_length: int = _NO_LIMIT


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Reads `tokenizer.json` and what stands beside it.

    Raises:
        CheckpointError: There is no `tokenizer.json`, a file is broken, or no token ends a text.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; write one with "
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
    backend = _parse_backend(path)
    settings = {
        **_read_json(folder / "special_tokens_map.json"),
        **_read_json(folder / "tokenizer_config.json"),
    }
    model = {**_read_json(folder / "config.json"), **_read_json(folder / "generation_config.json")}
    bos, eos, pad, unk = (
        _token(settings.get(f"{name}_token")) or _by_id(backend, model.get(f"{name}_token_id"))
        for name in ("bos", "eos", "pad", "unk")
    )
    if eos is None:
        raise CheckpointError(f"{folder}: no token ends a text; set eos_token in tokenizer_config.json")
    # transformers does the same when it loads: a token named here is special even if tokenizer.json says
    # nothing.
    named = [
        token
        for token in (bos, eos, pad, unk)
        if token is not None and backend.token_to_id(token) is not None
    ]
    backend.add_special_tokens(named)
    if backend.token_to_id(eos) is None:
        raise CheckpointError(
            f"{folder}: eos_token {eos!r} is not in tokenizer.json; set eos_token to one that is"
        )
    bos = bos if bos in named else None
    unk = unk if unk in named else None
    adds_bos = bos is not None and _adds_bos(backend, bos, settings)
    pad, pad_added = choose_pad(backend, pad if pad in named else None, eos, bos, unk)
    limit = settings.get("model_max_length", _NO_LIMIT)
    template = _read_template(folder, settings)
    return TokenizerFiles(backend, eos, pad, bos, unk, adds_bos, pad_added, template, int(limit or _NO_LIMIT))


def choose_pad(
    backend: tokenizers.Tokenizer, pad: str | None, eos: str, bos: str | None, unk: str | None
) -> tuple[str, bool]:
    """Returns the pad token, and whether it had to be added to the vocabulary.

    The tokenizer's own if it is not EOS, else a reserved one that looks like padding, else the one for
    unknown text, else a new one.
    """
    if pad is not None and pad != eos:
        return pad, False
    known = [name for name in _PAD_NAMES if backend.token_to_id(name) is not None and name not in (eos, bos)]
    if known:
        backend.add_special_tokens(known[:1])
        return known[0], False
    fallback = unk or "<unk>"
    if backend.token_to_id(fallback) is not None and fallback != eos:
        backend.add_special_tokens([fallback])
        return fallback, False
    backend.add_special_tokens([_NEW_PAD])
    return _NEW_PAD, True


def write_tokenizer(files: TokenizerFiles, template: str, folder: Path) -> None:
    """Writes the files from which plain transformers makes the same ids, with the template byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bos_token": files.bos, "eos_token": files.eos, "pad_token": files.pad, "unk_token": files.unk}
    tokens = {name: token for name, token in named.items() if token is not None}
    settings = {
        # transformers 4 does not know the name that 5 would write.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "model_max_length": files.max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_bytes(files.backend.to_str(pretty=True).encode())
    (folder / "tokenizer_config.json").write_bytes(_json_bytes(settings))
    (folder / "special_tokens_map.json").write_bytes(_json_bytes(tokens))
    (folder / "chat_template.jinja").write_bytes(template.encode())


def _parse_backend(path: Path) -> tokenizers.Tokenizer:
    # The library raises a bare Exception for what it does not understand, so the file is looked at first.
    if not isinstance(_read_json(path).get("model"), dict):
        raise CheckpointError(f"{path} is no tokenizer: it has no `model`; fetch the model again")
    return tokenizers.Tokenizer.from_str(path.read_bytes().decode())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch the model again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch the model again")
    return values


def _token(value: Any) -> str | None:
    """Reads a special token as transformers writes it: text, or an object with its text."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _by_id(backend: tokenizers.Tokenizer, value: Any) -> str | None:
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return None
    token: str | None = backend.id_to_token(value)
    return token


def _adds_bos(backend: tokenizers.Tokenizer, bos: str, settings: dict[str, Any]) -> bool:
    """Whether BOS begins every text; makes tokenizer.json agree with `add_bos_token` where they differ."""
    index = backend.token_to_id(bos)
    found = backend.encode("a", add_special_tokens=True).ids[:1] == [index]
    wanted = settings.get("add_bos_token")
    if not isinstance(wanted, bool) or wanted == found:
        return found
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A" if wanted else "$A", special_tokens=[(bos, index)]
    )
    return wanted


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}; fetch the model again") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


def _json_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
