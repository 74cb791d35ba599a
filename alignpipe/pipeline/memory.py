"""How much memory one process of a stage needs, part by part, told without torch.

models, a forward or an optimizer step, launch -> the moments of it; `moments.py` puts them together stage by stage

What is counted is what the stages hold. Weights, gradients and the two moments of AdamW are 4 bytes a number each and
are cut over processes as the stages 1 to 3 of arXiv:1910.02054 (section 5) cut them. What a forward holds is counted in
`activations.py`.

One figure is measured, not derived: `RUNTIME`, what a stage on a CPU leaves behind beside its tensors. The estimate is
of bytes in use: what the allocator keeps of freed ones comes on top (see `benchmarks/memory.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import ceil
from typing import Any

from alignpipe.config import OptimizerConfig, SamplingConfig
from alignpipe.data.grouping import PREFILL_TOKENS, group_size
from alignpipe.pipeline.activations import (
    WIDE,
    Batch,
    Role,
    Setting,
    layer_activations,
    logits_and_blocks,
    temporaries,
    unread_activations,
)
from alignpipe.pipeline.heaviest import Length, heaviest

ADAMW_MOMENTS = 2
# Bytes that live beside tensors: on a CPU as measured; on a GPU CUDA's context, cuBLAS, NCCL and gaps, a round figure.
RUNTIME = 20e6
GPU_RUNTIME = 1e9
# NF4 weights with their double-quantized scales, bytes each (arXiv:2305.14314, section 3).
QLORA_WEIGHT = 0.516
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
class Work:
    """The rows of a stage, as far as they are known.

    Attributes:
        longest: tokens of the longest row; of the longest prompt in a stage that samples.
        responses: of a prompt, in rankings.
        items: rows looked at, of each ranking the mean of its responses; none where they are not known.
        steps: of training.
    """

    longest: int
    responses: int = 1
    items: tuple[Length, ...] = ()
    steps: int = 1


def peak(moments: list[Memory]) -> Memory:
    """The moment that needs the most."""
    return max(moments, key=lambda memory: memory.total)


def micro_rows(config: OptimizerConfig, setting: Setting) -> int:
    """Rows of one forward on one process."""
    return max(1, min(config.micro_batch_size, ceil(config.batch_size / setting.processes)))


def heaviest_rows(config: Any, work: Work, setting: Setting) -> dict[bool, Length]:
    """The mean row of the heaviest micro-batch, by whether it adds to the gradients of one before it.

    The longest row, all of it learnt, where rows are not known or padded.
    """
    size, processes = micro_rows(config, setting), setting.processes
    several = config.batch_size > size * processes
    if not work.items or setting.attention == "eager":
        return {several: Length(work.longest, work.longest)}
    draw = partial(heaviest, work.items, config.seed, work.steps, config.batch_size, size, processes)
    return {False: draw(0), True: draw(1)} if several else {False: draw(0)}


def training_batches(config: Any, work: Work, setting: Setting, responses: int = 1) -> list[Batch]:
    """The heaviest forwards over training rows, each of several responses to a prompt."""
    items, found = micro_rows(config, setting), []
    for adds, row in heaviest_rows(config, work, setting).items():
        length, learnt = (min(tokens, config.max_length) for tokens in row)
        sharing = items * (responses - 1) * setting.shares(length - learnt)
        found.append(Batch(items * responses, length, learnt, sharing, adds))
    return found


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


def _copies(role: Role, setting: Setting, *, backward: bool = False, sampling: bool = False) -> float:
    """Copies of weights and gradients that forwards, or a backward pass too, make of one model."""
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
        # Autocast keeps a 16-bit copy of every matrix that is trained, that a gradient passes through, or that is read
        # token by token (models/casting.py, which weights in 4 bits do without); the head too.
        every = backward or not setting.adapted or (sampling and setting.adapter.kind != "qlora")
        matrices = shape.num_layers * shape.matrices * every + learnt * setting.adapted
        found += width * (matrices + shape.embedding * (not role.scalar))
    if backward and setting.launch.strategy == "ddp" and setting.processes > 1:
        found += WIDE * max(min(BUCKET, learnt), 0 if setting.adapted else shape.embedding)
    return found


def training_moments(held: Memory, role: Role, batches: Sequence[Batch], setting: Setting) -> list[Memory]:
    """One optimizer step: its heaviest forwards and backwards, and AdamW."""
    gradients = WIDE * role.own(setting) * setting.share
    updated = WIDE * _adamw_temporaries(role, setting)
    return [
        *(moment for batch in batches for moment in _gradient_moments(held, role, batch, setting)),
        held.plus("step", gradients=gradients, other=updated),
    ]


def _gradient_moments(held: Memory, role: Role, batch: Batch, setting: Setting) -> list[Memory]:
    """The loss, the blocks' backward pass, and its end."""
    shape, launch = role.shape, setting.launch
    layer, between = layer_activations(shape, batch, setting), temporaries(shape, batch, setting)
    kept = shape.num_layers * layer - unread_activations(role, batch, setting)
    again = 0.0
    if launch.gradient_checkpointing:
        stream = setting.width if setting.cut else WIDE
        kept, again = shape.num_layers * batch.tokens * shape.hidden_size * stream, layer
    if launch.activation_offload and setting.gpu:
        kept = min(kept, 2 * kept / shape.num_layers)
    # The last norm, and the states that the head reads.
    kept += 3 * shape.hidden_size * batch.tokens * WIDE
    kept += batch.rows * batch.learnt * shape.hidden_size * setting.width * (not role.scalar)
    logits, blocks = logits_and_blocks(role, batch, setting, backward=True)
    gradients = WIDE * role.own(setting) * setting.share
    embedding = 0.0 if setting.adapted else WIDE * shape.embedding
    head = embedding * (not role.scalar)
    tied = head * shape.tied
    before = gradients * batch.adds
    # Block by block the head's gradient grows, in 16 bits beside the product that is added to it.
    growing = 0.0 if role.whole_logits(setting) else head
    product = growing * (setting.width < WIDE) / 2
    offloaded = launch.optimizer_offload and setting.gpu
    moments = 0.0 if offloaded else held.optimizer
    copies = _copies(role, setting, backward=True)
    at_work = replace(held, optimizer=moments).plus("", copies=copies)
    return [
        at_work.plus(
            "loss",
            gradients=before + growing * (not batch.adds),
            activations=kept,
            logits=logits,
            other=blocks + product + growing * batch.adds,
        ),
        at_work.plus(
            "backward",
            gradients=before + head * setting.share * (not batch.adds),
            activations=kept + again + between,
            other=tied * batch.adds,
        ),
        # The embedding's gradient comes last, as a whole; a tied head's has waited for it.
        at_work.plus(
            "backward",
            gradients=gradients,
            activations=layer + between,
            other=embedding * batch.adds + tied,
        ),
    ]


def _adamw_temporaries(role: Role, setting: Setting) -> float:
    """Numbers that AdamW holds for a moment beside its state: none where it is fused (training/optim.py).

    Over sharded weights on a CPU it goes from tensor to tensor, with two copies of each; on a GPU it takes all of them
    at once (torch's `foreach`), with one copy of all.
    """
    own = role.own(setting)
    if not setting.cut:
        return 0.0
    if setting.gpu:
        return own * setting.share
    return min(2.0 * own, 2.0 * role.shape.largest) * setting.share


def scoring_moment(held: Memory, role: Role, batch: Batch, setting: Setting) -> Memory:
    """A forward without gradients over whole rows; the moments of AdamW wait."""
    logits, blocks = logits_and_blocks(role, batch, setting, backward=False)
    alive = temporaries(role.shape, batch, setting)
    waiting = _waiting(held, setting)
    copies = _copies(role, setting)
    return waiting.plus("score", copies=copies, activations=alive, logits=logits, other=blocks)


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
    size = group_size(num_samples, config.generation_batch_size)
    groups = config.generation_batch_size // size
    if num_prompts is not None:
        groups = min(groups, ceil(num_prompts / setting.processes) * ceil(num_samples / size))
    rows = groups * size
    token = shape.num_layers * shape.kv_width * width
    # rollout/cache.py: each group's prompt and its responses at full length.
    columns = groups * (prompt + size * config.max_response_length)
    # rollout/decoder.py: prompts computed ahead, beside the groups from the second time on.
    ahead = Batch(max(1, PREFILL_TOKENS // prompt), prompt)
    if num_prompts is not None and num_prompts <= ahead.rows * setting.processes:
        ahead = Batch(ceil(num_prompts / setting.processes), prompt)
    copies = _copies(role, setting, sampling=True)
    if setting.cut and setting.launch.generation_gather == "rollout":
        copies = width * role.size
    # rollout/sampling.py: logits, and two float64 tensors of their size.
    picked = rows * shape.vocab_size
    cache = (columns + ahead.tokens) * token
    waiting = _waiting(held, setting).plus("", copies=copies)
    return [
        waiting.plus("prompts", cache=cache, activations=temporaries(shape, ahead, setting)),
        waiting.plus("sample", cache=cache, logits=picked * width, other=picked * 16),
    ]


def check_moment(held: Memory, role: Role, setting: Setting) -> Memory:
    """The checkpoint opened once more beside the model; whole weights on one process alone."""
    return held if setting.cut else held.plus("check", weights=WIDE * role.size)
