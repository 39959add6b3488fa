"""The definition of right for sampling, in plain PyTorch and integers.

After one subtraction and one multiplication in fp32 all is integer arithmetic, so that every form on
every machine takes the same token from the same logits, seed and step:

    u_i = int(min((max - l_i) * scale, CAP))      distance to the largest logit, in 2^-15 octaves
    w_i = 2^(30 - u_i / 2^15), by an integer polynomial (relative error 5e-5)
    token = the first id where the running sum of kept w exceeds floor(R * sum / 2^62)

R is 62 bits of Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (step, row): its first
two words without their lowest bits. A NaN logit counts as -inf. When the largest logit is -inf the token
is 0; when it is +inf the choice is greedy. Greedy takes the lowest id of the largest logit.
"""

from __future__ import annotations

import torch

from .spec import CAP, EXP2, FRACTION_BITS, ONE, WEIGHT_BITS, SamplingOptions, SamplingSpec

_MASK32 = 0xFFFFFFFF


def sample(
    spec: SamplingSpec,
    logits: torch.Tensor,
    options: SamplingOptions,
    previous: torch.Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> torch.Tensor:
    """Return a token int64 [B] for each row of logits fp32 [B, V]; negative ids in `previous` are padding."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    for row, values in enumerate(logits):
        seen = None if previous is None else previous[row]
        values = penalize(torch.where(values.isnan(), -torch.inf, values), seen, options.repetition_penalty)
        largest = values.max()
        if options.greedy or not torch.isfinite(largest):
            tokens[row] = 0 if largest == -torch.inf else (values == largest).nonzero()[0, 0]
            continue
        w = keep(values, weights(values, options.scale), options)
        target = (draw(seed, step, row) * int(w.sum())) >> 62
        tokens[row] = (w.cumsum(0) > target).nonzero()[0, 0]
    return tokens


def penalize(values: torch.Tensor, previous: torch.Tensor | None, penalty: float) -> torch.Tensor:
    """Return the logits [V] with those of every token in `previous` made less likely, each once."""
    if previous is None or penalty == 1.0:
        return values
    seen = torch.zeros(values.shape, dtype=torch.bool)
    seen[previous[previous >= 0]] = True
    divisor = torch.full_like(values, penalty)
    return torch.where(seen, torch.where(values < 0, values * divisor, values / divisor), values)


def weights(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Return w int64 [V], 2^30 for the largest logit."""
    distance = (values.max() - values) * torch.tensor(scale)
    u = torch.where(distance < CAP, distance, float(CAP)).to(torch.int64)
    q, octaves = u & ((1 << FRACTION_BITS) - 1), u >> FRACTION_BITS
    c1, c2, c3, c4 = EXP2
    inner = c1 - (((c2 - (((c3 - ((c4 * q) >> 15)) * q) >> 15)) * q) >> 15)
    return ((1 << WEIGHT_BITS) - ((inner * q) >> 1)) >> octaves


def keep(values: torch.Tensor, w: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Return the weights with those that top_k, top_p and min_p drop set to zero."""
    if 0 < options.top_k < len(values):
        w = torch.where(values >= values.topk(options.top_k).values[-1], w, 0)
    if options.top_p_fixed < ONE:
        ordered, index = values.sort(descending=True)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), w[index].cumsum(0)])
        larger = before[torch.searchsorted(-ordered, -values)]  # the weight of all strictly larger logits
        limit = -(-options.top_p_fixed * int(w.sum()) // ONE)
        w = torch.where(larger < limit, w, 0)
    return torch.where(w >= options.min_weight, w, 0)


def draw(seed: int, step: int, row: int) -> int:
    """Return 62 random bits for (seed, step, row)."""
    words = philox4x32(
        (step & _MASK32, (step >> 32) & _MASK32, row & _MASK32, 0), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    return ((words[0] >> 1) << 31) | (words[1] >> 1)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the four words of Philox4x32-10."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & _MASK32, (low >> 32) ^ c3 ^ k1, low & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3
