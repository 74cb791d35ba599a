"""Runs pieces of TRL's own source on tensors from a file; a process of its own, since two TRLs have one name.

python peer_ppo.py JOBS.json IN.safetensors OUT.safetensors, with the TRL that is meant first on the path. The pieces
are cut out of the trainers between two lines and run as they stand: these trainers have no smaller functions.
"""

import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

# Where a piece begins and the line before which it ends.
PIECES = {
    "advantages": ("response_idxs = torch.arange(", "# Do multiple epochs of PPO training"),
    "losses": ("vpredclipped = torch.clamp(", "accelerator.backward(loss)"),
    "epochs": ("# Do multiple epochs of PPO training", "mean_kl = kl.sum(1).mean()"),
    "figures": ("mean_kl = kl.sum(1).mean()", "mean_non_score_reward ="),
    "grpo": ("rewards = (rewards_per_func *", "is_std_zero ="),
    "rloo": ("rewards = (rewards_per_func *", "# Normalize advantages over"),
}


def piece(source: str, name: str) -> str:
    """The lines of a piece, set against the left margin."""
    begin, end = PIECES[name]
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines) if begin in line)
    last = next(i for i, line in enumerate(lines) if i > first and end in line)
    while lines[last - 1].strip() == "with torch.no_grad():":
        last -= 1
    return textwrap.dedent("\n".join(lines[first:last]))


def ppo(name: str, given: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    from trl.experimental.ppo import ppo_trainer  # noqa: PLC0415

    space = {**vars(ppo_trainer), **given, "args": SimpleNamespace(**args)}
    for part in name.split("+"):
        exec(piece(inspect.getsource(ppo_trainer.PPOTrainer.train), part), space)
    return space


def group_advantages(name: str, given: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    from trl.trainer import grpo_trainer, rloo_trainer  # noqa: PLC0415

    module = {"grpo": grpo_trainer, "rloo": rloo_trainer}[name]
    trainer = {"grpo": grpo_trainer.GRPOTrainer, "rloo": rloo_trainer.RLOOTrainer}[name]
    source = inspect.getsource(trainer._generate_and_score_completions)
    rewards = given["rewards"]
    space = {
        **vars(module),
        **given,
        "rewards_per_func": rewards[:, None],
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
        "num_generations": args["num_samples"],
        "device": "cpu",
        "gather": lambda tensor: tensor,
        "self": SimpleNamespace(
            reward_weights=torch.ones(1),
            reward_clip_range=None,
            beta=args.get("beta", 0.0),
            scale_rewards=args.get("scale_rewards"),
        ),
    }
    exec(piece(source, name), space)
    return space


def ppo_epochs(given: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The whole inner loop of TRL's PPO on a policy that has one bias a token of the vocabulary, by SGD."""
    size, width = given["responses"].shape
    policy, value = torch.nn.Parameter(given["policy"].clone()), torch.nn.Parameter(torch.zeros(()))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args["gradient_accumulation_steps"])
    plain = torch.optim.SGD([policy, value], lr=args["learning_rate"])
    steps: list[torch.Tensor] = []
    plain.register_step_post_hook(lambda *_: steps.append(policy.detach().clone()))

    def forward(model: Any, ids: Any, pad: int) -> Any:
        logits = policy.expand(len(ids), width + 1, -1).clone()
        return SimpleNamespace(logits=logits), value.expand(len(ids), width + 1, 1).clone()

    shape = (args["num_ppo_epochs"], args["num_mini_batches"], args["gradient_accumulation_steps"])
    names = ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "entropy", "ratio")
    found = {f"{name}_stats": torch.zeros(shape) for name in names}
    ppo(
        "epochs",
        {
            **given,
            **found,
            "query_responses": given["responses"],
            "context_length": 1,
            "processing_class": SimpleNamespace(pad_token_id=0),
            "model": torch.nn.Linear(1, 1),
            "accelerator": accelerator,
            "optimizer": accelerator.prepare(plain),
            "forward": forward,
        },
        args | {"local_batch_size": size, "local_mini_batch_size": size // args["num_mini_batches"]},
    )
    return {**found, "steps": torch.stack(steps)}


def main(jobs: str, source: str, target: str) -> None:
    tensors, out = load_file(source), {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        given = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        if job["piece"] in ("grpo", "rloo"):
            space = group_advantages(job["piece"], given, job["args"])
        elif job["piece"] == "epochs":
            space = ppo_epochs(given, job["args"])
        else:
            space = ppo(job["piece"], given, job["args"])
        out |= {f"{name}.{key}": space[key].detach().clone().contiguous() for key in job["wanted"]}
    save_file(out, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
