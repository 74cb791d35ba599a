"""How much memory one process of a stage needs, part by part, told without torch.

models, a forward or an optimizer step, launch -> the moments of it; `moments.py` puts them together stage by stage

What is counted is what the stages hold. Weights, gradients and the two moments of AdamW are 4 bytes a number each and
are cut over processes as the stages 1 to 3 of arXiv:1910.02054 (section 5) cut them. Activations are what autograd
keeps, counted for our blocks as arXiv:2205.05198 (section 4.1) counts them for another; the tests hold the count
against a forward pass. Logits are (positions learnt x vocabulary), and once more as their gradient, since
`losses/logprobs.py` works through the rest in blocks.

One figure is measured, not derived: `RUNTIME`, what a stage on a CPU leaves behind beside its tensors. The estimate is
of bytes in use: what the allocator keeps of freed ones comes on top (see `benchmarks/memory.py`).
"""

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

from alignpipe.config import (
    SHARDED,
    AdapterConfig,
    LaunchConfig,
    OptimizerConfig,
    SamplingConfig,
)
from alignpipe.pipeline.architecture import Architecture

WIDE = 4
ADAMW_MOMENTS = 2
# losses/logprobs.py: elements of a (tokens, vocabulary) block in float32.
BLOCK = 2**22 * WIDE
# Bytes that live beside tensors: on a CPU as measured; on a GPU CUDA's context, cuBLAS, NCCL and gaps, a round figure.
RUNTIME = 20e6
GPU_RUNTIME = 1e9
# NF4 weights with their double-quantized scales, bytes each (arXiv:2305.14314, section 3).
QLORA_WEIGHT = 0.516
# rollout/cache.py, rollout/decoder.py: tokens of a page of responses and of prompts; of prompts computed at once.
PAGE, SHARED_PAGE, PREFILL_TOKENS = 32, 64, 2048
# training/gradients.py: numbers of gradients that travel at once.
BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes on one process at one moment of a stage.

    Attributes:
        moment: in a word.
        weights: of what is trained or sampled from, in float32, this process's part.
        frozen: of reference, reward model and the base below adapters.
        gradients: of the model under its update.
        optimizer: moments of AdamW.
        copies: weights in 16 bits, weights gathered from other processes, gradients on their way to them.
        activations: kept for the backward pass, or alive in a forward without one.
        logits: and their gradient.
        cache: keys and values.
        other: blocks, temporaries, the runtime.
    """

    moment: str = ""
    weights: float = 0.0
    frozen: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    copies: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """All parts together, in bytes."""
        return float(sum(getattr(self, name) for name in PARTS))

    def plus(self, moment: str, **parts: float) -> "Memory":
        """The same and more of some parts, at another moment."""
        return replace(self, moment=moment, **{name: getattr(self, name) + parts[name] for name in parts})


PARTS = tuple(spec.name for spec in fields(Memory) if spec.name != "moment")


@dataclass(frozen=True)
class Setting:
    """What a stage runs under.

    Attributes:
        launch: with a strategy and a number of processes that are decided.
        adapter: low-rank or none.
        gpu: whether the stage's memory is a GPU's, with that of the CPU beside it.
        eager: attention writes its weights out.
    """

    launch: LaunchConfig
    adapter: AdapterConfig
    gpu: bool = False
    eager: bool = False

    @property
    def processes(self) -> int:
        """Processes over all machines."""
        return self.launch.num_processes or 1

    @property
    def width(self) -> int:
        """Bytes of a number in matrix products."""
        return WIDE if self.launch.precision == "fp32" else 2

    @property
    def share(self) -> float:
        """The part of weights, gradients and moments that one process holds at rest."""
        return 1 / self.processes if self.launch.strategy in SHARDED else 1.0

    @property
    def cut(self) -> bool:
        """Whether weights are cut over the processes."""
        return self.share < 1

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained in place of whole weights."""
        return self.adapter.kind != "none"


@dataclass(frozen=True)
class Work:
    """The rows of a stage, as far as they are known.

    Attributes:
        longest: tokens of the longest row; of the longest prompt in a stage that samples.
        shortest_prompt: tokens before the first one learnt, in the row that has the fewest.
        responses: of a prompt, in rankings.
    """

    longest: int
    shortest_prompt: int = 0
    responses: int = 1


@dataclass(frozen=True)
class Batch:
    """One forward: sequences, their padded length, and the positions at which the vocabulary's head works."""

    rows: int
    length: int
    columns: int = 0

    @property
    def tokens(self) -> int:
        """Padding among them."""
        return self.rows * self.length


@dataclass(frozen=True)
class Role:
    """A model as a stage uses it: with the head of a language model or one number a token."""

    shape: Architecture
    scalar: bool = False

    def own(self, setting: Setting) -> int:
        """Parameters that belong to this role alone: all, or its adapter and its scalar head."""
        if not setting.adapted:
            return self.shape.scalar_parameters if self.scalar else self.shape.parameters
        adapter = self.shape.adapter_parameters(setting.adapter.rank, list(setting.adapter.target_modules))
        return adapter + self.shape.hidden_size * self.scalar

    @property
    def size(self) -> int:
        """Parameters of the whole model."""
        return self.shape.scalar_parameters if self.scalar else self.shape.parameters


def peak(moments: list[Memory]) -> Memory:
    """The moment that needs the most."""
    return max(moments, key=lambda memory: memory.total)


def micro_rows(config: OptimizerConfig, setting: Setting) -> int:
    """Rows of one forward on one process."""
    return max(1, min(config.micro_batch_size, ceil(config.batch_size / setting.processes)))


def training_batch(config: Any, work: Work, setting: Setting) -> Batch:
    """One forward over training rows of the longest kind."""
    length = min(work.longest, config.max_length)
    return Batch(micro_rows(config, setting), length, length - work.shortest_prompt)


def held_memory(
    setting: Setting, trained: list[Role] | None = None, frozen: list[Role] | None = None
) -> Memory:
    """Weights and moments that lie in memory all the time; one base below the adapters of all roles."""
    trained, frozen = trained or [], frozen or []
    learnt, still = (sum(role.own(setting) for role in roles) for roles in (trained, frozen))
    bases = {role.shape: role.shape.parameters for role in (*trained, *frozen)} if setting.adapted else {}
    base = QLORA_WEIGHT if setting.adapter.kind == "qlora" else WIDE
    moments = ADAMW_MOMENTS * WIDE * learnt * setting.share
    return Memory(
        weights=WIDE * learnt * setting.share,
        frozen=(WIDE * still + base * sum(bases.values())) * setting.share,
        optimizer=moments,
        other=GPU_RUNTIME if setting.gpu else RUNTIME,
    )


def _copies(role: Role, setting: Setting, *, backward: bool) -> float:
    """Copies of weights and gradients that a forward, or a backward pass too, makes of one model."""
    shape, width = role.shape, setting.width
    outside = role.size - shape.num_layers * shape.layer
    learnt = role.own(setting)
    if setting.cut:
        # zero2 keeps all layers gathered from forward to backward; otherwise it is the layer at work and the next one.
        layers = shape.num_layers if setting.launch.strategy == "zero2" else 2
        # Beside them what is outside of all layers, and the gradient of one on its way, in float32.
        return width * (layers * shape.layer + outside) + WIDE * shape.layer * backward
    found = 0.0
    if width < WIDE:
        # Autocast keeps a 16-bit copy of every matrix that is trained, or that a gradient passes through.
        matrices = shape.num_layers * shape.matrices + shape.embedding * (not role.scalar)
        found += width * (learnt if setting.adapted and not backward else matrices)
    if backward and setting.launch.strategy == "ddp" and setting.processes > 1:
        found += WIDE * max(min(BUCKET, learnt), 0 if setting.adapted else shape.embedding)
    return found


def training_moments(
    held: Memory, role: Role, batch: Batch, config: OptimizerConfig, setting: Setting
) -> list[Memory]:
    """One optimizer step: the loss, the blocks' backward pass, its end, and AdamW."""
    shape, launch = role.shape, setting.launch
    layer, between = _layer_activations(shape, batch, setting), _temporaries(shape, batch, setting)
    kept = shape.num_layers * layer
    again = 0.0
    if launch.gradient_checkpointing:
        stream = setting.width if setting.cut else WIDE
        kept, again = shape.num_layers * batch.tokens * shape.hidden_size * stream, layer
    if launch.activation_offload and setting.gpu:
        kept = min(kept, 2 * kept / shape.num_layers)
    kept += 3 * shape.hidden_size * batch.tokens * WIDE
    logits, block = _logits(shape, batch, setting)
    gradients = WIDE * role.own(setting) * setting.share
    head = 0.0 if setting.adapted else WIDE * shape.embedding
    tied = head * (shape.tied and not role.scalar)
    accumulates = config.batch_size > micro_rows(config, setting) * setting.processes
    before = gradients * accumulates
    sharded = WIDE * shape.embedding * setting.share
    offloaded = launch.optimizer_offload and setting.gpu
    moments = 0.0 if offloaded else held.optimizer
    copies = _copies(role, setting, backward=True)
    at_work = replace(held, optimizer=moments).plus("", copies=copies)
    updated = _adamw_temporaries(role, setting)
    return [
        at_work.plus("loss", gradients=before, activations=kept, logits=2 * logits, other=block),
        at_work.plus(
            "backward",
            gradients=before + (0.0 if role.scalar or setting.adapted else sharded) * (not accumulates),
            activations=kept + again + between,
            other=tied * accumulates,
        ),
        # The embedding's gradient comes last, as a whole; a tied head's has waited for it.
        at_work.plus(
            "backward",
            gradients=gradients,
            activations=layer + between,
            other=head * accumulates + tied,
        ),
        held.plus("step", gradients=gradients, other=WIDE * updated),
    ]


def _adamw_temporaries(role: Role, setting: Setting) -> float:
    """Numbers that AdamW holds for a moment beside its state.

    On a CPU it goes from tensor to tensor, with two copies of each; on a GPU it takes all of them at once (torch's
    `foreach`), with one copy of all.
    """
    own = role.own(setting)
    if setting.gpu:
        return own * setting.share
    return min(2.0 * own, 2.0 * role.shape.largest) * setting.share


def _layer_activations(shape: Architecture, batch: Batch, setting: Setting) -> float:
    """Bytes that one block keeps for the backward pass."""
    numbers = shape.kept * setting.width + shape.kept_wide * WIDE
    if setting.adapted:
        # A frozen norm needs no gradient and keeps no scaled input; an adapter keeps what its first matrix made.
        numbers -= 2 * shape.hidden_size * WIDE
        numbers += setting.adapter.rank * len(shape.linears) * setting.width
    if setting.width < WIDE and not setting.cut:
        # Autocast casts a matrix's input each time it is read, and keeps every one of these.
        numbers += shape.read_again * setting.width
    if setting.eager:
        # Attention weights in float32, once more in 16 bits; keys and values repeated for every query head.
        weights = batch.length * (WIDE + (setting.width if setting.width < WIDE else 0))
        repeated = 2 * (shape.num_heads - shape.num_kv_heads) * shape.head_dim * setting.width
        numbers += shape.num_heads * (weights - WIDE) + repeated
    return batch.tokens * numbers


def _temporaries(shape: Architecture, batch: Batch, setting: Setting) -> float:
    """Bytes alive for a moment in a feed-forward block: its three inner tensors and two of the stream."""
    return batch.tokens * (3 * shape.intermediate_size + 2 * shape.hidden_size) * setting.width


def _logits(shape: Architecture, batch: Batch, setting: Setting) -> tuple[float, float]:
    """Bytes of the logits, and of the blocks in float32 that are made of them."""
    numbers = batch.rows * batch.columns * shape.vocab_size
    return numbers * setting.width, min(BLOCK, numbers * WIDE) * (1 if setting.width == WIDE else 2)


def scoring_moment(held: Memory, role: Role, batch: Batch, setting: Setting) -> Memory:
    """A forward without gradients over whole rows; the moments of AdamW wait."""
    logits, block = _logits(role.shape, batch, setting)
    alive = _temporaries(role.shape, batch, setting)
    waiting = _waiting(held, setting)
    copies = _copies(role, setting, backward=False)
    return waiting.plus("score", copies=copies, activations=alive, logits=logits, other=2 * block)


def _waiting(held: Memory, setting: Setting) -> Memory:
    return replace(held, optimizer=0.0) if setting.launch.optimizer_offload and setting.gpu else held


def sampling_moments(
    held: Memory,
    role: Role,
    config: SamplingConfig,
    prompt: int,
    num_prompts: int | None,
    num_samples: int,
    setting: Setting,
) -> list[Memory]:
    """The prompts' forward, and the last token: `generation_batch_size` responses side by side."""
    if num_prompts == 0:
        return []
    shape, width = role.shape, setting.width
    prompt = min(prompt, config.max_prompt_length)
    rows = config.generation_batch_size
    if num_prompts is not None:
        rows = min(rows, ceil(num_prompts / setting.processes) * num_samples)
    prompts = ceil(rows / num_samples)
    token = shape.num_layers * shape.kv_width * width
    # rollout/cache.py: pages for every response, full length, and for the prompts that they go on from.
    pages = rows * _rounded(config.max_response_length, PAGE) + prompts * _rounded(prompt, SHARED_PAGE)
    if num_samples == 1:
        pages = rows * _rounded(prompt + config.max_response_length, PAGE)
    # rollout/decoder.py: prompts computed ahead, beside the pages from the second time on.
    ahead = Batch(max(1, PREFILL_TOKENS // prompt), prompt)
    if num_prompts is not None and num_prompts <= ahead.rows * setting.processes:
        ahead = Batch(ceil(num_prompts / setting.processes), prompt)
    copies = _copies(role, setting, backward=False)
    if setting.cut and setting.launch.generation_gather == "rollout":
        copies = width * role.size
    # rollout/sampling.py: logits, and two float64 tensors of their size.
    picked = rows * shape.vocab_size
    cache = (pages + ahead.tokens) * token
    waiting = _waiting(held, setting).plus("", copies=copies)
    return [
        waiting.plus("prompts", cache=cache, activations=_temporaries(shape, ahead, setting)),
        waiting.plus("sample", cache=cache, logits=picked * width, other=picked * 16),
    ]


def _rounded(tokens: int, page: int) -> int:
    return ceil(tokens / page) * page


def check_moment(held: Memory, role: Role, setting: Setting) -> Memory:
    """The checkpoint opened once more beside the model; whole weights on one process alone."""
    return held if setting.cut else held.plus("check", weights=WIDE * role.size)
