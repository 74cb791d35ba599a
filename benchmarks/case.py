"""What a benchmark consists of: a case has a workload, our side, and the peers at their settings; no torch.

Every side of a case is a function that is run by name in a process of its own: (job) -> measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SEED = 0
MAX_LENGTH = 512
# Of one AdamW step on both sides; each name is that of alignpipe and of transformers.
OPTIMIZER = {
    "learning_rate": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
# Gradients of a step added up row by row, or pair by pair: little is padded, and activations stay in the cache.
ONE_BY_ONE = {"micro_batch_size": 1}


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings, and how many rows one repetition has.

    Attributes:
        rows: demonstrations of one repetition.
        pairs: preferences of one repetition.
        kv_heads: of keys and values; as many as of queries for None.
        questions: prompts of a rollout, and of the best of several.
        prompts: of mixed length, answered in one repetition.
        quick_rows: demonstrations of a repetition that is cut short.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    pairs: int
    kv_heads: int | None = None
    questions: int = 16
    prompts: int = 32
    quick_rows: int = 24

    @property
    def num_parameters(self) -> int:
        """Weights of the language model."""
        shared = (self.kv_heads or self.heads) / self.heads
        attention = round((2 + 2 * shared) * self.hidden**2)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden + self.layers * block + self.hidden


SIZES = {
    "S": Size(192, 512, 6, 6, 2048, rows=48, pairs=24),
    "M": Size(512, 1376, 8, 8, 8192, rows=24, pairs=12),
    # The shape of Llama 3.2 1B.
    "1B": Size(
        2048, 8192, 16, 32, 32768, rows=256, pairs=128, kv_heads=8, questions=64, prompts=128, quick_rows=64
    ),
}
# What is compared on a CPU.
CPU_SIZES = ("S", "M")


def with_rows(size: Size, rows: int | None) -> Size:
    """The size with other rows a repetition, and half as many pairs; None leaves them."""
    return size if rows is None else replace(size, rows=rows, pairs=rows // 2)


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case.

    Attributes:
        label: with the settings, as the table names it.
        function: `module:name`, called with a `Job`.
        settings: of this side alone.
        path: folder below `peers` of the environment that comes first on the path, for a second TRL.
    """

    label: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        name: on the command line and in the table.
        ours: our side.
        peers: the peers, or one peer at several settings; the fastest counts.
        targets: size -> how many times as fast as the peer we have to be.
        flops: floating point operations a token and parameter.
        settings: of both sides.
        same_losses: whether the first peer must see our losses at every step.
        max_memory: peak memory as a share of the peer's; None where it is reported alone.
        min_share: of the matrix rate that we have to reach; None where it is reported alone.
        device: of both sides: cpu or cuda.
        precision: of both sides: fp32, or bf16 over weights in float32.
        max_loss_difference: of a step, relative, against the peer that must see our losses.
    """

    name: str
    ours: Side
    peers: tuple[Side, ...]
    targets: Mapping[str, float]
    flops: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    same_losses: bool = False
    max_memory: float | None = None
    min_share: float | None = None
    device: str = "cpu"
    precision: str = "fp32"
    max_loss_difference: float = 1e-3


@dataclass(frozen=True)
class Job:
    """What one process is told.

    Attributes:
        function: `module:name`.
        workload: folder that `workload.build` wrote.
        scratch: empty folder of this process.
        size: name of the model's size.
        repetitions: timed ones; one more comes before them to warm up.
        threads: of torch.
        settings: of the case and of the side.
        device: of the case.
        precision: of the case.
    """

    function: str
    workload: Path
    scratch: Path
    size: str
    repetitions: int
    threads: int
    settings: dict[str, Any]
    device: str = "cpu"
    precision: str = "fp32"


@dataclass(frozen=True)
class Measured:
    """What one process found.

    Attributes:
        seconds: of each timed repetition.
        tokens: that each of them is worth, without padding.
        peak: bytes resident at the most, up to the end of the last repetition; on a GPU those that torch holds there.
        losses: of every step, those of the warm-up first; empty where there are none to compare.
        rates: floating point operations a second of matrix products, before and after.
    """

    seconds: list[float]
    tokens: list[int]
    peak: int
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
