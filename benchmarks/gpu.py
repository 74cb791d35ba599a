"""What a GPU has to show, as one table: `python -m benchmarks.gpu [WORD ...]`; `make test-gpu` installs and runs it.

The toy pipeline on CUDA in bf16, the same by torch's launcher with one process, every stage on a random Llama of a
billion weights, fsdp2 on one rank, QLoRA. Each case is one `alignpipe` command; the table has its seconds, its tokens a
second, its peak of GPU memory and what the plan said it would be. Words choose cases whose name holds one of them.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from alignpipe.compose.composition import compose
from alignpipe.pipeline.plan import make_plan

BF16 = ("launch.device=cuda", "launch.precision=bf16")
SHORT = ("stage.batch_size=8", "stage.micro_batch_size=4", "data.world.num_prompts=400")
FIT = (*SHORT, "stage.max_steps=8", "stage.eval_rows=8", "stage.log_steps=1")
# Hidden, intermediate, layers, heads, key-value heads: the shape of Llama 3.2 1B, with the toy vocabulary.
LARGE = (2048, 8192, 16, 32, 8)


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        name: in the table.
        words: after `alignpipe run`; `{folder}` is where the models lie.
    """

    name: str
    words: tuple[str, ...]


def _large(kind: str, *words: str) -> Case:
    told = [word for word in words if word not in FIT and "{folder}" not in word]
    words = (f"stage={kind}", "model={folder}/base", "data=toy", *BF16, *words)
    return Case(" ".join(["1B", kind, *told]), words)


CASES = (
    Case("toy pipeline", BF16),
    Case("toy pipeline, ddp, world 1", (*BF16, "launch.strategy=ddp", "launch.num_processes=1")),
    Case("toy pipeline, fsdp2, one rank", (*BF16, "launch.strategy=fsdp2", "launch.num_processes=1")),
    *(_large("sft", *FIT, f"model.attn_implementation={word}") for word in ("sdpa", "flash_attention_2")),
    _large("sft", *FIT, "launch.gradient_checkpointing=true"),
    _large("sft", *FIT, "launch.strategy=fsdp2", "launch.num_processes=1"),
    _large("sft", *FIT, "launch.optimizer_offload=true"),
    _large("sft", *FIT, "adapter=qlora"),
    _large("rm", *FIT),
    _large("dpo", *FIT),
    _large("collect", "stage.num_prompts=64"),
    _large("rs", *FIT, "stage.num_prompts=64", "stage.reward_model={folder}/reward"),
    _large(
        "ppo", *SHORT, "stage.num_rollouts=4", "stage.rollout_size=8", "stage.reward_model={folder}/reward"
    ),
    _large("eval", "stage.num_prompts=64", "stage.policies=[base]"),
)


def build(folder: Path) -> None:
    """Write the random models."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from alignpipe.data.tokenizer import Tokenizer
    from alignpipe.models.saving import save_model

    tokenizer = Tokenizer.toy()
    hidden, inner, layers, heads, kv_heads = LARGE
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder / "base")
    config.num_labels, config.problem_type = 1, "regression"
    save_model(LlamaForSequenceClassification(config), tokenizer, folder / "reward")


def run(case: Case, folder: Path) -> str:
    """The line of a case in the table."""
    outputs = folder / "outputs"
    words = [word.format(folder=folder) for word in (*case.words, f"output_dir={outputs}")]
    plan = make_plan(compose(words).config)
    told = max((row.estimate.memory.total for row in plan.rows if row.estimate), default=0.0)
    peak = _Peak()
    began = time.monotonic()
    with peak:
        done = subprocess.run(
            [sys.executable, "-m", "alignpipe", "run", *words], capture_output=True, text=True, check=False
        )
    seconds = time.monotonic() - began
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return f"| {case.name} | exit {done.returncode}: {said} | | | |"
    rates = [
        json.loads(line).get("tokens_per_second", 0.0)
        for path in (outputs / "runs" / plan.run).glob("*/metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    rate = f"{max(rates):,.0f}" if any(rates) else ""
    return f"| {case.name} | {seconds:.0f} | {rate} | {peak.bytes / 1e9:.1f} | {told / 1e9:.1f} |"


class _Peak:
    """The most memory that the GPU had in use, of all processes, asked of nvidia-smi ten times a second."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._done.wait(0.1):
            used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
            self.bytes = max(self.bytes, *(float(mebibytes) * 2**20 for mebibytes in used))

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main(wanted: list[str]) -> int:
    """Run the cases and print the table; 5 where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run", file=sys.stderr)
        return 5
    print(f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| case | seconds | tokens/s | peak GB | planned GB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for case in CASES:
            if not wanted or any(word in case.name for word in wanted):
                print(run(case, Path(folder)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
