"""What torch.compile gives: the same steps of one model with and without it, in turn (docs/performance.md).

python -m benchmarks.compiling [STEPS]
"""

import random
import statistics
import sys
import time

# Steps before the figures: the first compiles, and AdamW makes its moments.
WARM_UP = 3


def main() -> None:
    """Print the time of each pair of steps, and the median of their ratios."""
    import torch
    from torch.optim import AdamW
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

    from alignpipe.data.collate import TokenBatch, collate
    from alignpipe.data.examples import Example
    from alignpipe.models.attention import allow_packing
    from alignpipe.models.compiling import compile_training
    from alignpipe.models.forward import batch_logprobs

    numbers = random.Random(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=2048, max_position_embeddings=512, tie_word_embeddings=True, **shape)

    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        return allow_packing(LlamaForCausalLM._from_config(config, attn_implementation="sdpa")).train()

    def batch() -> TokenBatch:
        sizes = [(numbers.randint(20, 120), numbers.randint(30, 200)) for _ in range(8)]
        rows = [[[numbers.randrange(2048) for _ in range(size)] for size in pair] for pair in sizes]
        return collate([Example.of(prompt, response) for prompt, response in rows], 0)

    def step(one: PreTrainedModel, optimizer: AdamW, rows: TokenBatch) -> float:
        start = time.perf_counter()
        (-batch_logprobs(one, rows).sum() / int(rows.loss_mask.sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    torch.set_num_threads(2)
    models = [model(), compile_training(model())]
    optimizers = [AdamW(one.parameters(), 1e-3) for one in models]
    ratios = []
    for index in range(int(sys.argv[1]) if len(sys.argv) > 1 else 24):
        rows, seconds = batch(), {}
        for which in (0, 1) if index % 2 else (1, 0):
            seconds[which] = step(models[which], optimizers[which], rows)
        print(f"{index:3} plain {seconds[0]:.3f} s, compiled {seconds[1]:.3f} s", flush=True)
        ratios += [seconds[0] / seconds[1]] if index >= WARM_UP else []
    print(f"times as fast: {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})")


if __name__ == "__main__":
    main()
