"""Peak memory of PPO with adapters on one base against PPO with four whole models.

    python -m benchmarks.lora_memory [MICRO_BATCH ...]

A random Llama of 30 million weights (hidden 512, 8 layers, vocabulary 8192, float32) runs the real ppo stage on the
CPU, sequences of 256 tokens, each case in a process of its own. What is told is the peak of the resident size above
the size after imports, in MB, and the ratio of the two.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

MICRO_BATCHES = (1, 4, 16)
TOKENS = 256
ROOT = Path(__file__).parents[1]


def measure(micro_batch: int, folder: Path) -> dict[str, float]:
    """Run both cases, each in a fresh process.

    Args:
        micro_batch: sequences in one forward.
        folder: empty or made by an earlier call; keeps the models.

    Returns:
        `full` and `lora` in bytes, and their `ratio`.
    """
    if not (folder / "base").is_dir():
        _child("make", folder)
    found = {kind: float(_child(kind, folder, str(micro_batch))) for kind in ("full", "lora")}
    return {**found, "ratio": found["lora"] / found["full"]}


def _child(kind: str, folder: Path, *more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-m", "benchmarks.lora_memory", "--child", kind, str(folder), *more]
    done = subprocess.run(call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().rpartition("\n")[2]


def _make(folder: Path) -> None:
    """Whole and adapted checkpoints of a policy and of a reward model, and prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignpipe.compose.composition import compose
    from alignpipe.data.tokenizer import Tokenizer
    from alignpipe.models.adapters import Adapters
    from alignpipe.models.loading import ModelSource, load_policy
    from alignpipe.models.saving import save_model
    from alignpipe.models.scalar_head import load_scalar_model

    torch.manual_seed(0)
    tokenizer = Tokenizer.toy()
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    start = folder / "start"
    LlamaForCausalLM(config).save_pretrained(start)
    whole = ModelSource(str(start))
    save_model(load_policy(whole, tokenizer), tokenizer, folder / "base")
    save_model(load_scalar_model(whole, tokenizer, seed=0), tokenizer, folder / "full_rm")
    adapters = Adapters(compose(["model=pretrained", "model.path=x", "adapter=lora"]).config.adapter, seed=0)
    adapted = ModelSource(str(folder / "base"), adapters=adapters)
    save_model(load_scalar_model(adapted, tokenizer, seed=0), tokenizer, folder / "lora_rm", adapters)
    lines = [json.dumps({"prompt": f"Name the number {n}."}) for n in range(100, 500)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run(kind: str, folder: Path, micro_batch: int) -> int:
    """Bytes at the peak of one ppo stage, above what stood after the imports."""
    from alignpipe.compose.composition import compose
    from alignpipe.pipeline.runner import run

    for name in ("alignpipe.worker", "peft", "peft.tuners.lora", "transformers.models.llama.modeling_llama"):
        import_module(name)
    batch = max(2, micro_batch)
    words = [
        "stage=ppo",
        f"adapter={'lora' if kind == 'lora' else 'none'}",
        "adapter.rank=16",
        "adapter.alpha=32",
        "launch=cpu",
        f"model.path='{folder / 'base'}'",
        f"stage.reward_model='{folder / f'{kind}_rm'}'",
        f"data='{folder / 'prompts.jsonl'}'",
        f"output_dir='{folder / f'outputs-{kind}-{micro_batch}'}'",
        f"model.max_length={TOKENS}",
        "model.max_prompt_length=32",
        # What a prompt takes of the 256 is about 16 tokens; a random model comes to no end by itself.
        f"model.max_response_length={TOKENS - 16}",
        "stage.num_rollouts=1",
        "stage.ppo_epochs=2",
        f"stage.rollout_size={batch}",
        f"stage.batch_size={batch}",
        f"stage.micro_batch_size={micro_batch}",
        f"stage.generation_batch_size={micro_batch}",
    ]
    composed = compose(words)
    before = _status("VmRSS")
    run(composed.config, words, composed.yaml)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of this process in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(words: list[str]) -> None:
    """Print a line for each micro-batch."""
    if words[:1] == ["--child"]:
        kind, folder = words[1], Path(words[2])
        print(_make(folder) if kind == "make" else _run(kind, folder, int(words[3])))
        return
    with TemporaryDirectory() as folder:
        print("micro-batch  full MB  lora MB  ratio")
        for micro_batch in [int(word) for word in words] or MICRO_BATCHES:
            found = measure(micro_batch, Path(folder))
            full, lora = found["full"] / 1e6, found["lora"] / 1e6
            print(f"{micro_batch:<11}  {full:7.0f}  {lora:7.0f}  {found['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
