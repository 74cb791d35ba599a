"""Log-probabilities of the tokens that stand in a sequence, and sums over masks.

logits (B, T, V), ids (B, T) -> logprobs (B, T - 1); values, mask -> masked sums, means, whitened values
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Elements of a (tokens, vocabulary) block that are held in float32 at once: 16 MiB.
BLOCK_ELEMENTS = 2**22
# Logits so few are kept for the backward pass, which is then spared a matrix product: 64 MiB in float32.
KEPT_ELEMENTS = 2**24


def token_logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """`log p(x_{t+1} | x_{<=t}) = z[x_{t+1}] - logsumexp(z)`, with z = logits / temperature.

    Works through blocks of tokens in float32, forwards and backwards, so that the only thing of size
    (tokens x vocabulary) beside the logits is their gradient, in their own dtype.

    Args:
        logits: (B, T, V), any float dtype; position t holds the prediction of token t + 1.
        input_ids: (B, T), the tokens themselves.
        temperature: of the sampling distribution whose logprobs are wanted.

    Returns:
        (B, T - 1) float32, natural logarithms (float64 where the logits are).
    """
    # The last position predicts nothing: it gets any target and is cut off, which spares copying logits.
    targets = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
    return target_logprobs(logits, targets, temperature)[:, :-1]


def target_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """`log p(target) = z[target] - logsumexp(z)` at every position, with z = logits / temperature.

    Args:
        logits: (..., V), any float dtype.
        targets: (...), long.
        temperature: of the sampling distribution whose logprobs are wanted.

    Returns:
        (...) float32, natural logarithms (float64 where the logits are).
    """
    flat = logits.reshape(-1, logits.shape[-1])
    logprobs: Tensor = _TokenLogprobs.apply(flat, targets.reshape(-1), temperature)  # type: ignore[no-untyped-call]
    return logprobs.view(targets.shape)


class _TokenLogprobs(torch.autograd.Function):
    """Rows of logits (N, V) and targets (N,) -> logprobs (N,); keeps only logits and the N normalizers."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        normalizers, chosen = [], []
        for rows, ids in zip(_blocks(logits), torch.split(targets, _block_rows(logits)), strict=True):
            scaled = _scaled(rows, temperature)
            normalizers.append(scaled.logsumexp(-1))
            chosen.append(scaled.gather(-1, ids[:, None]).squeeze(-1))
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature = temperature
        return torch.cat(chosen) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """`d logp / d z_v = (1[v = target] - p_v) / temperature`."""
        logits, targets, normalizer = ctx.saved_tensors
        result = torch.empty_like(logits)
        size = _block_rows(logits)
        weights = grads[0] / ctx.temperature
        parts = zip(
            _blocks(logits),
            _blocks(result),
            *(torch.split(x, size) for x in (targets, normalizer, weights)),
            strict=True,
        )
        for rows, out, ids, norm, weight in parts:
            probabilities = (_scaled(rows, ctx.temperature) - norm[:, None]).exp_()
            gradient = probabilities.mul_(-weight[:, None])
            gradient.scatter_add_(-1, ids[:, None], weight[:, None])
            out.copy_(gradient)
        return result, None, None


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """`target_logprobs` of `hidden @ weight.T + bias`, without ever holding many of these logits.

    Works through blocks of tokens; the backward pass computes the logits of each block again, unless those of all
    tokens are few (`KEPT_ELEMENTS`).

    Args:
        hidden: (N, d), states that the head reads.
        weight: (V, d), of the head; products are taken in the dtype of `hidden`, under autocast in that of autocast.
        bias: (V,), of the head.
        targets: (N,), long.
        temperature: of the sampling distribution whose logprobs are wanted.

    Returns:
        (N,) float32, natural logarithms (float64 where the hidden states are).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    found: Tensor = _HeadLogprobs.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-untyped-call]
    return found


class _HeadLogprobs(torch.autograd.Function):
    """Hidden states (N, d), head and targets (N,) -> logprobs (N,); keeps what it is given and the N normalizers."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        size = max(1, BLOCK_ELEMENTS // len(weight))
        ctx.head = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        ctx.kept = [] if len(targets) * len(weight) <= KEPT_ELEMENTS and any(ctx.needs_input_grad) else None
        normalizers, chosen = [], []
        for states, ids in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            logits = linear(states, *ctx.head)
            scaled = _scaled(logits, temperature)
            normalizers.append(scaled.logsumexp(-1))
            chosen.append(scaled.gather(-1, ids[:, None]).squeeze(-1))
            if ctx.kept is not None:
                ctx.kept.append(logits)
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden, targets, normalizer)
        ctx.size, ctx.temperature = size, temperature
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return torch.cat(chosen) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """`d logp / d z_v = (1[v = target] - p_v) / temperature`, z = logits, and on to what they are made of."""
        hidden, targets, normalizer = ctx.saved_tensors
        weight, bias = ctx.head
        # Their gradient takes the place of the logits, so another pass over the same graph makes them again.
        kept, ctx.kept = ctx.kept, None
        for_hidden = torch.empty_like(hidden)
        for_weight = None
        for_bias = torch.zeros_like(bias, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        weights = grads[0] / ctx.temperature
        parts = [torch.split(x, ctx.size) for x in (hidden, for_hidden, targets, normalizer, weights)]
        for index, (states, out, ids, norm, share) in enumerate(zip(*parts, strict=True)):
            logits = linear(states, weight, bias) if kept is None else kept[index]
            scaled = _scaled(logits, ctx.temperature)
            gradient = scaled.sub_(norm[:, None]).exp_().mul_(-share[:, None])
            gradient.scatter_add_(-1, ids[:, None], share[:, None])
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, weight, out=out)
            if ctx.needs_input_grad[1]:
                for_weight = _add_product(for_weight, gradient, states, ctx.dtypes[0])
            if for_bias is not None:
                for_bias += gradient.sum(0)
        return for_hidden, for_weight, for_bias, None, None


def _add_product(total: Tensor | None, gradient: Tensor, states: Tensor, dtype: torch.dtype) -> Tensor:
    """Total (V, d) += gradient.T @ states; in place where no dtype stands between."""
    if total is None:
        return (gradient.T @ states).to(dtype)
    if total.dtype == states.dtype:
        return total.addmm_(gradient.T, states)
    return total.add_(gradient.T @ states)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H = -sum_v p_v log p_v of every next-token distribution, of the whole vocabulary.

    Costs one more pass over the logits, forwards and backwards, and for its gradient one more tensor of their size and
    dtype; everything else is blocks of tokens in float32, as for the logprobs.

    Args:
        logits: (..., V), any float dtype.
        temperature: of the distribution.

    Returns:
        (...) float32, nats (float64 where the logits are).
    """
    flat = logits.reshape(-1, logits.shape[-1])
    found: Tensor = _Entropy.apply(flat, temperature)  # type: ignore[no-untyped-call]
    return found.view(logits.shape[:-1])


class _Entropy(torch.autograd.Function):
    """Rows of logits (N, V) -> entropies (N,); keeps only the logits and the N entropies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        parts = []
        for rows in _blocks(logits):
            logprobs = _scaled(rows, temperature).log_softmax(-1)
            parts.append(-(logprobs.exp() * logprobs).sum(-1))
        found = torch.cat(parts)
        ctx.save_for_backward(logits, found)
        ctx.temperature = temperature
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """`d H / d z_v = -p_v (log p_v + H) / temperature`."""
        logits, found = ctx.saved_tensors
        result = torch.empty_like(logits)
        size = _block_rows(logits)
        weights = grads[0] / ctx.temperature
        parts = zip(_blocks(logits), _blocks(result), found.split(size), weights.split(size), strict=True)
        for rows, out, entropies, weight in parts:
            logprobs = _scaled(rows, ctx.temperature).log_softmax(-1)
            out.copy_(logprobs.exp() * (logprobs + entropies[:, None]) * -weight[:, None])
        return result, None


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the values where the mask is true; what stands elsewhere, infinities too, plays no part."""
    kept = values.masked_fill(~mask.bool(), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values where the mask is true; 0 where it is true nowhere."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8, *, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + eps) over everything under the mask; 0 elsewhere.

    Args:
        values: any shape; pass the whole rollout, not a minibatch, for whitening that is global.
        mask: same shape.
        eps: keeps equal values at 0.
        keep_mean: add the mean again, so that only the scale changes.
    """
    mean = masked_mean(values, mask)
    centered = values - mean
    variance = masked_mean(centered.square(), mask)
    whitened = centered * (variance + eps).rsqrt()
    return (whitened + mean if keep_mean else whitened).masked_fill(~mask.bool(), 0.0)


def _block_rows(logits: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // logits.shape[-1])


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, _block_rows(logits))


def _scaled(rows: Tensor, temperature: float) -> Tensor:
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide if temperature == 1.0 else wide / temperature
