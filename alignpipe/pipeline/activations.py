"""What one forward of a model holds, told without torch.

a model's role, rows and what they share, launch -> bytes that its blocks keep, of logits, alive for a moment

Activations are what autograd keeps, counted for our blocks as arXiv:2205.05198 (section 4.1) counts them for another;
the tests hold the count against a forward pass. Rows have no padding, and a prompt that several of them share is there
once (data/packing.py). Logits are (tokens learnt x vocabulary) where the whole model makes them, and once more as their
gradient; elsewhere `losses/logprobs.py` keeps few and works through many in blocks.
"""

from dataclasses import dataclass

from alignpipe.config import SHARDED, AdapterConfig, LaunchConfig
from alignpipe.data.packing import MIN_SHARED
from alignpipe.pipeline.architecture import Architecture

WIDE = 4
# losses/logprobs.py: bytes of a (tokens, vocabulary) block in float32, and how many logits are kept.
BLOCK = 2**22 * WIDE
KEPT_LOGITS = 2**24
# models/attention.py: rows of so few tokens are padded for attention.
SHORT = 96


@dataclass(frozen=True)
class Setting:
    """What a stage runs under.

    Attributes:
        launch: with a strategy and a number of processes that are decided.
        adapter: low-rank or none.
        gpu: whether the stage's memory is a GPU's, with that of the CPU beside it.
        attention: its implementation.
    """

    launch: LaunchConfig
    adapter: AdapterConfig
    gpu: bool = False
    attention: str = "sdpa"

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

    def shares(self, prompt: float) -> bool:
        """Whether a prompt of so many tokens is read once for all rows of a forward that have it."""
        return self.attention != "eager" and prompt >= MIN_SHARED


@dataclass(frozen=True)
class Batch:
    """One forward.

    Attributes:
        rows: sequences.
        length: tokens of each, on average.
        learnt: those of each that the vocabulary's head predicts.
        sharing: rows whose prompt another row has too.
        adds: its gradients are added to those of a forward before it.
    """

    rows: int
    length: float
    learnt: float = 0
    sharing: int = 0
    adds: bool = False

    @property
    def prompt(self) -> float:
        """Tokens of a row before those that are learnt."""
        return self.length - self.learnt

    @property
    def tokens(self) -> float:
        """Tokens that are read."""
        return self.rows * self.length - self.sharing * self.prompt


@dataclass(frozen=True)
class Role:
    """A model as a stage uses it.

    Attributes:
        shape: of its body.
        num_heads: of a reward or value model; 0 is a language model.
        entropy: its gradient is taken too.
    """

    shape: Architecture
    num_heads: int = 0
    entropy: bool = False

    @property
    def scalar(self) -> bool:
        """Whether it gives numbers a token in place of logits."""
        return self.num_heads > 0

    def own(self, setting: Setting) -> int:
        """Parameters that belong to this role alone: all, or its adapter and its scalar head."""
        if not setting.adapted:
            return self.size
        adapter = self.shape.adapter_parameters(setting.adapter.rank, list(setting.adapter.target_modules))
        return adapter + self.shape.hidden_size * self.num_heads

    @property
    def size(self) -> int:
        """Parameters of the whole model."""
        shape = self.shape
        return shape.body + shape.hidden_size * self.num_heads if self.scalar else shape.parameters

    def whole_logits(self, setting: Setting) -> bool:
        """Whether the logits of all learnt tokens are there at once (models/forward.py)."""
        return not self.scalar and (setting.cut or self.entropy or self.shape.softcapped)


def layer_activations(shape: Architecture, batch: Batch, setting: Setting) -> float:
    """Bytes that one block keeps for the backward pass."""
    numbers = (shape.kept - _made_again(shape, setting)) * setting.width + shape.kept_wide * WIDE
    if setting.adapted:
        # A frozen norm needs no gradient and keeps no scaled input; an adapter keeps what its first matrix made.
        numbers -= 2 * shape.hidden_size * WIDE
        numbers += setting.adapter.rank * len(shape.linears) * setting.width
    if setting.width < WIDE and not setting.cut:
        # Autocast casts a matrix's input each time it is read, and keeps every one of these.
        numbers += shape.read_again * setting.width
    return batch.tokens * numbers + _attention_activations(shape, batch, setting)


def unread_activations(role: Role, batch: Batch, setting: Setting) -> float:
    """Bytes that the last block does not keep, of tokens that are not read (models/last_block.py)."""
    if setting.cut or role.whole_logits(setting):
        return 0.0
    unread = batch.tokens - min(batch.tokens, batch.rows * batch.learnt)
    # What attention gives, where not all of a row asks, and that once more, row laid by row.
    times = 1 if _asks_whole(batch) else 2
    attended = times * role.shape.num_heads * role.shape.head_dim if setting.attention == "sdpa" else 0
    inside = role.shape.kept_inside - _made_again(role.shape, setting)
    return unread * (inside + attended) * setting.width


def _made_again(shape: Architecture, setting: Setting) -> int:
    """Numbers of a token that a feed-forward makes again, where its last matrix has no adapter."""
    adapted = setting.adapted and not {"all-linear", "down_proj"}.isdisjoint(setting.adapter.target_modules)
    return 0 if adapted else shape.made_again


def _asks_whole(batch: Batch) -> bool:
    """Whether all that a row sees asks, as models/attention.py decides it for rows that attend one by one."""
    return batch.length > SHORT and 2 * batch.learnt >= batch.length


def _attention_activations(shape: Architecture, batch: Batch, setting: Setting) -> float:
    """Bytes that attention keeps in one block beside queries, keys, values and what comes out, each once."""
    width, queries = setting.width, shape.num_heads * shape.head_dim
    if setting.attention == "flash_attention_2":
        # A shared prompt's keys and values lie before those of each row that reads it.
        return batch.sharing * batch.prompt * shape.kv_width * width
    # Keys and values are repeated for every query head.
    repeated = batch.tokens * (2 * queries - shape.kv_width) * width
    if setting.attention == "eager":
        # Its weights in float32, once more in 16 bits, in place of a normalizer a head.
        weights = batch.length * (WIDE + (width if width < WIDE else 0)) - WIDE
        return repeated + batch.tokens * shape.num_heads * weights
    # What comes out of each row is laid side by side.
    return repeated + (batch.tokens * queries + _sharing(shape, batch, setting)) * width


def _sharing(shape: Architecture, batch: Batch, setting: Setting) -> float:
    """Numbers that attention keeps in one block for rows whose prompt another row has too."""
    queries = shape.num_heads * shape.head_dim
    autocast = setting.width < WIDE and not setting.cut
    if batch.length <= SHORT:
        # Padded to the others: a prompt's queries, keys, values and what comes out. Autocast casts the mask each time.
        mask = batch.rows * batch.length**2 * (batch.sharing > 0)
        return 4 * batch.sharing * batch.prompt * queries + mask * autocast
    # Keys and values of the prompt and its response, where only autocast leaves nothing of what it casts.
    if not _asks_whole(batch):
        again = (2 * batch.length - batch.learnt * autocast) * queries
        return batch.sharing * (again + batch.learnt * batch.length * autocast)
    # Queries and what comes out, with its normalizers, as well.
    again = (3 * batch.length + batch.prompt - 2 * batch.learnt * autocast) * queries
    return batch.sharing * (again + batch.prompt * shape.num_heads * WIDE / setting.width)


def temporaries(shape: Architecture, batch: Batch, setting: Setting) -> float:
    """Bytes alive for a moment in a feed-forward block: its three inner tensors and two of the stream."""
    return batch.tokens * (3 * shape.intermediate_size + 2 * shape.hidden_size) * setting.width


def logits_and_blocks(role: Role, batch: Batch, setting: Setting, *, backward: bool) -> tuple[float, float]:
    """Bytes of the logits that are held with their gradients, and of the blocks that losses/logprobs.py works in."""
    numbers = 0 if role.scalar else batch.rows * batch.learnt * role.shape.vocab_size
    if role.whole_logits(setting):
        # Before and after a soft cap; one gradient, and the entropy's that is added to it.
        held = numbers * (1 + role.shape.softcapped + backward * (1 + role.entropy))
    else:
        held = numbers * (backward and numbers <= KEPT_LOGITS)
    # Probabilities, and those of the block before; logits too where they are in 16 bits.
    more = setting.width < WIDE
    return held * setting.width, min((2 + more) * BLOCK, (1 + more) * numbers * WIDE)
