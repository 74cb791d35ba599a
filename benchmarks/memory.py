"""Estimated against measured memory: `python benchmarks/memory.py [WORD ...]`, a fresh process for each case.

Words choose cases whose name holds one of them; `--glibc` leaves malloc as it is. Needs Linux and a CPU.

What is estimated is `alignpipe plan`'s total of the stage. What is measured is the highest resident size of the
process that runs the stage (VmHWM, set back by /proc/self/clear_refs), less its size after all imports. glibc hands a
freed block back at once only if it was mapped by itself, and raises that limit to 32 MB as it sees blocks come and go,
so the peak of a small model depends on the history of its heap. Cases therefore run with MALLOC_MMAP_THRESHOLD_=65536,
under which resident is what is in use, and that is what the estimate is of. `--glibc` shows what the allocator adds.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# Words of one token each in the embedded world's vocabulary, after a space.
LETTERS = "abcdfghl"
SIZES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary; Llama, embeddings tied
    "3M": (192, 512, 4, 4, 2, 4096),
    "2M": (192, 512, 4, 4, 2, 700),
    "4M-wide": (64, 256, 2, 4, 4, 50000),
    "14M": (384, 1024, 6, 6, 6, 8000),
    "28M": (512, 1408, 6, 8, 8, 16000),
    "57M": (640, 1728, 8, 10, 5, 32000),
}
STEPS = ("stage.save_steps=2", "stage.log_steps=1")
FIT = (*STEPS, "stage.max_steps=2", "stage.eval_rows=2", "data.on_overflow=cut")
ASK = ("stage.num_samples=1", "stage.max_response_length=16", "stage.max_prompt_length=64")
RS = (*FIT, "stage.reward_model={folder}/reward", "stage.replay=0", "stage.num_samples=4")
COLLECT = ("stage.num_prompts=16", "stage.num_samples=4", "rollout.batch_size=64")
PPO = (*STEPS, "stage.num_rollouts=2", "stage.reward_model={folder}/reward", "stage.num_samples=1")


@dataclass(frozen=True)
class Case:
    """A stage to estimate and to measure.

    Attributes:
        size: of the model, in `SIZES`.
        kind: of the stage.
        prompt: tokens of the longest prompt in the data.
        response: tokens of the longest response in the data.
        words: on the command line; `{folder}` is where the models lie.
        data: a file made for the case, or `toy`.
    """

    size: str
    kind: str
    prompt: int
    response: int
    words: tuple[str, ...] = field(default=())
    data: str = "{folder}/rows.jsonl"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        keep = [
            word.removeprefix("stage.")
            for word in self.words
            if word not in {*FIT, *ASK, *PPO, *RS, *COLLECT}
        ]
        return " ".join([self.kind, self.size, f"{self.prompt}+{self.response}", *keep])

    def line(self, folder: Path) -> list[str]:
        """The whole command line behind `alignpipe run`."""
        words = [f"stage={self.kind}", f"model={folder}/base", f"data={self.data}", "launch=cpu", *self.words]
        return [word.format(folder=folder) for word in (*words, "output_dir={folder}/outputs")]


def _batch(batch: int, micro: int) -> tuple[str, str]:
    return f"stage.batch_size={batch}", f"stage.micro_batch_size={micro}"


def _sizes(rollout: int, batch: int, micro: int, response: int) -> tuple[str, ...]:
    lengths = (f"stage.max_response_length={response}", "stage.max_prompt_length=64")
    return f"stage.rollout_size={rollout}", *_batch(batch, micro), *lengths


def _cut(strategy: str) -> tuple[str, str]:
    return f"launch.strategy={strategy}", "launch.num_processes=2"


CASES = (
    Case("3M", "sft", 32, 96, (*FIT, *ASK, *_batch(16, 16))),
    Case("3M", "sft", 64, 448, (*FIT, *ASK, *_batch(8, 4))),
    Case("4M-wide", "sft", 32, 96, (*FIT, *ASK, *_batch(16, 8))),
    Case("28M", "sft", 48, 208, (*FIT, *ASK, *_batch(8, 4))),
    Case("28M", "sft", 48, 208, (*FIT, *ASK, *_batch(4, 4))),
    Case("57M", "sft", 32, 96, (*FIT, *ASK, *_batch(4, 2))),
    Case("14M", "rm", 32, 96, (*FIT, *_batch(4, 4))),
    Case("57M", "rm", 32, 96, (*FIT, *_batch(2, 1))),
    Case("14M", "dpo", 32, 96, (*FIT, *ASK, *_batch(8, 4))),
    Case("28M", "dpo", 32, 224, (*FIT, *ASK, *_batch(2, 1), "stage.max_steps=5")),
    Case("3M", "ppo", 32, 64, (*PPO, *_sizes(16, 16, 16, 64))),
    Case("28M", "ppo", 32, 32, (*PPO, *_sizes(8, 8, 4, 32))),
    Case("2M", "rs", 32, 64, (*RS, *_batch(8, 8), "stage.num_prompts=64", "stage.max_response_length=64")),
    Case("14M", "collect", 64, 96, (*COLLECT, "stage.max_response_length=96"), "toy"),
    Case("28M", "sft", 48, 208, (*FIT, *ASK, *_batch(8, 4), "launch.gradient_checkpointing=true")),
    Case("57M", "rm", 32, 96, (*FIT, *_batch(4, 2), "launch.num_processes=2")),
    Case("57M", "sft", 32, 96, (*FIT, *ASK, *_batch(8, 4), *_cut("fsdp2"))),
    Case("57M", "rm", 32, 96, (*FIT, *_batch(8, 4), *_cut("zero2"))),
    Case("28M", "sft", 32, 96, (*FIT, *ASK, *_batch(8, 4), "adapter=lora")),
    Case("28M", "ppo", 32, 32, (*PPO, *_sizes(8, 8, 4, 32), "adapter=lora")),
)


def estimated(case: Case, folder: Path) -> tuple[float, str]:
    """Bytes that the plan tells for the stage, and the moment of its peak."""
    from alignpipe.compose.composition import compose
    from alignpipe.pipeline.plan import make_plan

    found = make_plan(compose(case.line(folder)).config).rows[0].estimate
    assert found is not None
    return found.memory.total, found.memory.moment


def measured(case: Case, folder: Path, *, glibc: bool = False) -> float:
    """Bytes that the stage added to its process at the highest."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    if not glibc:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    line = [sys.executable, __file__, "--stage", *case.line(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def build(case: Case, folder: Path) -> None:
    """Write the models and the rows of a case, in a process of its own."""
    index = str(CASES.index(case))
    subprocess.run([sys.executable, __file__, "--build", index, str(folder)], check=True, capture_output=True)


def _build(case: Case, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from alignpipe.data.tokenizer import Tokenizer
    from alignpipe.models.saving import save_model

    tokenizer = Tokenizer.toy()
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[case.size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder / "base")
    config.num_labels, config.problem_type = 1, "regression"
    save_model(LlamaForSequenceClassification(config), tokenizer, folder / "reward")
    # Every second row is half as long; user, assistant and EOS are tokens too.
    lengths = [(case.prompt // (1 + i % 2), case.response // (1 + i % 2)) for i in range(96)]
    rows = [_row(case.kind, i, prompt - 2, response - 1) for i, (prompt, response) in enumerate(lengths)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _row(kind: str, index: int, prompt: int, response: int) -> dict[str, str]:
    asked, chosen, rejected = (
        _text(index + shift, size) for shift, size in ((0, prompt), (1, response), (2, response))
    )
    if kind in ("rm", "dpo"):
        return {"prompt": asked, "chosen": chosen, "rejected": rejected}
    return {"prompt": asked} if kind in ("ppo", "rs") else {"prompt": asked, "completion": chosen}


def _text(seed: int, length: int) -> str:
    """So many words; the first few are the seed, so that no two texts are equal."""
    digits = [LETTERS[seed // len(LETTERS) ** place % len(LETTERS)] for place in range(4)]
    return " ".join([*digits, *(LETTERS[(seed + i * i) % len(LETTERS)] for i in range(length))][:length])


def _run_stage(words: list[str]) -> None:
    """Run a stage in this process and print how many bytes it added at the highest."""
    # Everything that a stage imports on its way, torch's own late imports too.
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import alignpipe.worker  # noqa: F401
    from alignpipe.compose.composition import compose
    from alignpipe.pipeline import runner

    composed = compose(words)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    runner.run(composed.config, words, composed.yaml)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    sys.stdout.write(f"{max(_status('VmHWM'), children) - before}\n")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(argv: list[str]) -> None:
    """Run the cases that are chosen and print a table."""
    if argv[:1] == ["--build"]:
        return _build(CASES[int(argv[1])], Path(argv[2]))
    if argv[:1] == ["--stage"]:
        return _run_stage(argv[1:])
    wanted = [word for word in argv if word != "--glibc"]
    print(f"{'estimate':>9} {'measured':>9} {'error':>7}  at        case")
    for case in CASES:
        if wanted and not any(word in case.name for word in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            build(case, Path(folder))
            told, moment = estimated(case, Path(folder))
            found = measured(case, Path(folder), glibc="--glibc" in argv)
        row = f"{told / 1e6:>6.1f} MB {found / 1e6:>6.1f} MB {told / found - 1:>+7.1%}"
        print(f"{row}  {moment:<8}  {case.name}", flush=True)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
