"""What a model's `config.json` says about its size: weights, activations and FLOPs, without torch.

config.json -> Architecture; exact for the families in `FAMILIES`, by Llama's formula for what only looks like one
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignpipe.config import ArchitectureConfig
from alignpipe.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """How one family of decoders differs from Llama (arXiv:2302.13971).

    Attributes:
        tied: whether input and output embeddings are one where config.json does not say.
        qkv_bias: queries, keys and values always have a bias.
        norms: of width `hidden_size` in a block.
        head_norms: queries and keys are normalised per head.
        head_dim: where config.json does not say; None is hidden_size / num_heads.
    """

    tied: bool = False
    qkv_bias: bool = False
    norms: int = 2
    head_norms: bool = False
    head_dim: int | None = None


LLAMA = Family()
# arXiv: mistral 2310.06825, qwen2 2407.10671, qwen3 2505.09388, gemma 2403.08295, gemma2 2408.00118, gemma3 2503.19786.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True, head_dim=128),
    "gemma": Family(tied=True, head_dim=256),
    "gemma2": Family(tied=True, norms=4, head_dim=256),
    "gemma3_text": Family(tied=True, norms=4, head_norms=True, head_dim=256),
}
GPT2 = "gpt2"
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Linear:
    """One matrix of a block: its name in the model, numbers in and out, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True)
class Architecture:
    """The size of a decoder.

    Attributes:
        model_type: of transformers.
        exact: False where Llama's formula was taken for a family that the plan does not know.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream, H.
        intermediate_size: width inside a feed-forward block, F.
        num_layers: blocks.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: width of a head.
        positions: rows of a learned position embedding; 0 for rotary ones.
        tied: input and output embeddings are one.
        linears: matrices of a block.
        norm_parameters: of the norms in a block.
        final_norm: parameters of the norm after the last block.
        kept_wide: numbers a token leaves in a block for the backward pass in float32 whatever the precision.
        kept: the same, in the precision of matrix products.
        kept_inside: of `kept`, those that the feed-forward keeps.
        read_again: numbers of a token that a second and third matrix read too.
        softcapped: logits go through a tanh (arXiv:2408.00118, section 2).
        made_again: of `kept_inside`, those that models/feed_forward.py makes again from the others.
        source: where the weights come from; roles of one source share a base below their adapters.
    """

    model_type: str
    exact: bool
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    positions: int
    tied: bool
    linears: tuple[Linear, ...]
    norm_parameters: int
    final_norm: int
    kept_wide: int
    kept: int
    kept_inside: int
    read_again: int
    softcapped: bool = False
    made_again: int = 0
    source: str = ""

    @property
    def embedding(self) -> int:
        """Numbers in the input embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def matrices(self) -> int:
        """Weights of a block that a token is multiplied with."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def layer(self) -> int:
        """Parameters of a block."""
        return sum(linear.parameters for linear in self.linears) + self.norm_parameters

    @property
    def body(self) -> int:
        """Parameters without an output head."""
        return (
            self.embedding
            + self.positions * self.hidden_size
            + self.num_layers * self.layer
            + self.final_norm
        )

    @property
    def parameters(self) -> int:
        """Parameters of the language model; tied embeddings count once."""
        return self.body + (0 if self.tied else self.embedding)

    @property
    def scalar_parameters(self) -> int:
        """Parameters of a reward or value model: the body and one number a token."""
        return self.body + self.hidden_size

    @property
    def largest(self) -> int:
        """Numbers in the largest single tensor."""
        return max(self.embedding, *(linear.inputs * linear.outputs for linear in self.linears))

    @property
    def kv_width(self) -> int:
        """Numbers that a token puts into the cache of one block."""
        return 2 * self.num_kv_heads * self.head_dim

    def adapter_parameters(self, rank: int, target_modules: list[str]) -> int:
        """Parameters of one LoRA (arXiv:2106.09685): rank x (inputs + outputs) a matrix it stands beside."""
        chosen = [
            linear
            for linear in self.linears
            if target_modules == ["all-linear"] or linear.name in target_modules
        ]
        return self.num_layers * sum(rank * (linear.inputs + linear.outputs) for linear in chosen)

    def forward_flops(self, length: float, *, head: bool = True) -> float:
        """FLOPs of one token in a forward pass (arXiv:2204.02311, appendix B, a third of its 6N + 12LHQT).

        Args:
            length: tokens of the sequence it stands in; causal attention sees half of them on average.
            head: whether the output head works at the token.
        """
        attention = 4 * self.num_heads * self.head_dim * length / 2
        return self.num_layers * (2 * self.matrices + attention) + 2 * self.embedding * head


def tiny_architecture(shape: ArchitectureConfig, vocab_size: int) -> Architecture:
    """The Llama that `model=tiny` builds, embeddings tied."""
    return parse_architecture(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "tie_word_embeddings": True,
        }
    )


def read_architecture(folder: Path) -> tuple[Architecture | None, str]:
    """Read the shape of a model folder.

    Returns:
        The architecture, None where the shape means nothing to the plan; and a sentence where it is not exact.

    Raises:
        CheckpointError: there is no readable `config.json`.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw = {**raw, **(raw.get("text_config") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a model configuration ({error})") from error
    name = raw.get("model_type")
    try:
        found = parse_architecture(raw)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        known = name == GPT2 or name in FAMILIES
        why = (
            "config.json lacks part of the shape" if known else f"the plan does not know model_type {name!r}"
        )
        return None, f"{why}: parameters and memory are unknown"
    note = (
        ""
        if found.exact
        else f"the plan does not know model_type {name!r}: parameters and memory are estimated as Llama's"
    )
    return found, note


def parse_architecture(raw: dict[str, Any]) -> Architecture:
    """The architecture that the fields of a config.json describe.

    Raises:
        KeyError: a field is missing, or the family is unknown and no dense decoder.
        TypeError: a field is no number.
        ValueError: a field is no number, or a mixture of experts, of which the plan knows nothing.
    """
    if raw.get("model_type") == GPT2:
        return _gpt2(raw)
    family = FAMILIES.get(raw.get("model_type", ""), LLAMA)
    if any("expert" in key for key in raw):
        raise ValueError("a mixture of experts")
    vocab, hidden, inner, layers, heads = (int(raw[name]) for name in SHAPE)
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    width = int(raw.get("head_dim") or family.head_dim or hidden // heads)
    bias, mlp_bias = bool(raw.get("attention_bias")), bool(raw.get("mlp_bias"))
    queries, keys = heads * width, kv_heads * width
    tied = raw.get("tie_word_embeddings")
    linears = (
        Linear("q_proj", hidden, queries, bias or family.qkv_bias),
        Linear("k_proj", hidden, keys, bias or family.qkv_bias),
        Linear("v_proj", hidden, keys, bias or family.qkv_bias),
        Linear("o_proj", queries, hidden, bias),
        Linear("gate_proj", hidden, inner, mlp_bias),
        Linear("up_proj", hidden, inner, mlp_bias),
        Linear("down_proj", inner, hidden, mlp_bias),
    )
    # Each norm keeps its input and the input scaled to variance 1, in float32, and gives the next matrix its input.
    head_norms = 2 * (queries + keys) + heads + kv_heads if family.head_norms else 0
    return Architecture(
        model_type=str(raw.get("model_type")),
        exact=raw.get("model_type") in FAMILIES,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        positions=0,
        tied=family.tied if tied is None else bool(tied),
        linears=linears,
        norm_parameters=family.norms * hidden + (2 * width if family.head_norms else 0),
        final_norm=hidden,
        kept_wide=2 * family.norms * hidden + family.norms + heads + head_norms,
        # Inputs of q_proj and gate_proj; queries, keys, values, attention's output; gate, its SiLU, up, their product.
        kept=2 * hidden + 2 * queries + 2 * keys + 4 * inner,
        kept_inside=hidden + 4 * inner,
        # q, k and v read the same; gate and up do.
        read_again=3 * hidden,
        softcapped=bool(raw.get("final_logit_softcapping")),
        made_again=2 * inner if raw.get("hidden_act", "silu") == "silu" and not mlp_bias else 0,
    )


def _gpt2(raw: dict[str, Any]) -> Architecture:
    """GPT-2: learned positions, biases everywhere, two matrices in a feed-forward block, embeddings tied."""
    vocab, hidden, layers, heads = (int(raw[name]) for name in ("vocab_size", "n_embd", "n_layer", "n_head"))
    inner = int(raw.get("n_inner") or 4 * hidden)
    linears = (
        Linear("c_attn", hidden, 3 * hidden, True),
        Linear("c_proj", hidden, hidden, True),
        Linear("c_fc", hidden, inner, True),
        Linear("c_proj", inner, hidden, True),
    )
    tied = raw.get("tie_word_embeddings")
    return Architecture(
        model_type=GPT2,
        exact=True,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        positions=int(raw["n_positions"]),
        tied=True if tied is None else bool(tied),
        linears=linears,
        norm_parameters=4 * hidden,
        final_norm=2 * hidden,
        kept_wide=2 * hidden + 4 + heads,
        # Inputs of three matrices; c_attn's output; five numbers a unit that the tanh form of GELU keeps.
        kept=6 * hidden + 5 * inner,
        kept_inside=hidden + 5 * inner,
        read_again=0,
    )


def with_vocabulary(architecture: Architecture, vocab_size: int) -> Architecture:
    """The same model after its embedding has grown to hold every id of a tokenizer; it never shrinks."""
    return replace(architecture, vocab_size=max(architecture.vocab_size, vocab_size))
