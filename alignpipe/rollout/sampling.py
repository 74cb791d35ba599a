"""Random numbers by address: the number for a token depends on what it is for, not on when it is drawn.

(seed, step, prompt, sample, position) -> uniform number -> token, by the inverse of the distribution function

So batch grouping, restarts and the number of processes change nothing about what is sampled.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

Integers = npt.NDArray[np.int64] | int


def uniforms(
    seed: int, step: int, prompt_index: Integers, sample_index: Integers, position: Integers
) -> Tensor:
    """One uniform number in [0, 1) for each address.

    Each part of the address picks a member of a splitmix64 stream that the parts before it have seeded
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

    Args:
        seed: of the stage.
        step: of the stage's outer loop.
        prompt_index: global index of the prompt; the last three broadcast against each other.
        sample_index: which sample of the prompt.
        position: of the token in the response, from 0.

    Returns:
        float64, on the CPU, in the broadcast shape.
    """
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (seed, step, prompt_index, sample_index, position):
            # Through int64 first: a negative or too large index fails there rather than wrap around.
            index = np.asarray(part, dtype=np.int64).astype(np.uint64)
            state = _mix(state + _GOLDEN * (index + np.uint64(1)))
    shape = np.broadcast_shapes(*(np.shape(part) for part in (prompt_index, sample_index, position)))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53).view(shape)


def pick(logits: Tensor, uniforms: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token a row: the first at which the distribution function, in float64, exceeds the number.

    Args:
        logits: (N, V).
        uniforms: (N,) float64 in [0, 1); None takes the most probable token.
        temperature: divides the logits.

    Returns:
        Token ids (N,) long, and their logprobs at that temperature (N,) float32.
    """
    device = logits.device
    if device.type == "mps":
        # Has no float64.
        logits, uniforms = logits.cpu(), None if uniforms is None else uniforms.cpu()
    probabilities = (logits.double() / temperature).softmax(-1)
    if uniforms is None:
        tokens = probabilities.argmax(-1, keepdim=True)
    else:
        cumulative = probabilities.cumsum(-1)
        # The last entry differs from 1 by rounding; scaled by it, no number can fall beyond the end.
        targets = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)
    logprobs = probabilities.gather(-1, tokens).log().float()
    return tokens.squeeze(-1).to(device), logprobs.squeeze(-1).to(device)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the input moves half of the bits of the output."""
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    result: npt.NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return result
