"""The loop of our own behind a compiled model's `generate`: greedy search and plain sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from ..batch import Sampling

if TYPE_CHECKING:
    from .whole import CompiledModel

# Options of a generation config that the loop knows; any other one that is set goes to transformers.
_KNOWN = {
    "max_length", "max_new_tokens", "min_length", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "num_beams",
    "num_return_sequences", "transformers_version", "_from_model_config", "num_beam_groups",
}  # fmt: skip
_ARGUMENTS = {
    "attention_mask",
    "input_ids",
    "streamer",
    "stopping_criteria",
    "generation_config",
    "use_cache",
}


def own_generate(compiled: CompiledModel, inputs: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """Return (ids int64 [B, T + new], "") or (None, why transformers' loop has to run)."""
    config, reason = _settings(compiled, options)
    if reason:
        return None, reason
    ids = inputs if inputs is not None else options.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        return None, "the inputs are not token ids [B, T]"
    from .whole import left_padding

    mask = options.get("attention_mask")
    if mask is None and config.pad_token_id is not None and config.pad_token_id not in _ends(config):
        mask = ids != config.pad_token_id  # as transformers does
        mask = mask.long() if not bool(mask.all()) else None
    lengths, problem = left_padding(mask, ids.shape[1])
    if problem:
        return None, problem
    given = options.get("max_new_tokens", config.max_new_tokens)
    length = config.max_length if given is None else None
    most = given if length is None else (20 if length is None else length - ids.shape[1])
    if most is None or most < 1:
        return None, "no room for a new token"
    streamer, stopping = options.get("streamer"), options.get("stopping_criteria") or []
    if streamer is not None and ids.shape[0] > 1:
        return None, "a streamer with a batch"
    return _loop(compiled, ids, lengths, int(most), config, streamer, stopping), ""


def _settings(compiled: CompiledModel, options: dict[str, Any]) -> tuple[Any, str]:
    """The effective generation config, or why the own loop does not serve it."""
    import copy

    config = copy.deepcopy(options.get("generation_config") or compiled.generation_config)
    rest = {k: v for k, v in options.items() if k not in _ARGUMENTS}
    unknown = [k for k, v in rest.items() if not hasattr(config, k) and v is not None]
    if unknown:
        return None, f"the option {unknown[0]!r}"
    config.update(**rest)
    plain = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name not in _KNOWN and value != plain.get(name) and value not in (None, False, {}, []):
            return None, f"the option {name!r}"
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name, None) or 1) != 1:
            return None, f"{name}={getattr(config, name)}"
    if config.use_cache is False or options.get("use_cache") is False:
        return None, "use_cache=False"
    if config.min_length:
        return None, "the option 'min_length'"
    return config, ""


def _ends(config: Any) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else ([int(ends)] if isinstance(ends, int) else [int(e) for e in ends])


def _sampling(config: Any) -> Sampling:
    def value(name: str, plain: Any) -> Any:
        found = getattr(config, name, None)
        return plain if found is None else found

    penalty = value("repetition_penalty", 1.0)
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=value("temperature", 1.0), top_k=value("top_k", 50), top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0), repetition_penalty=penalty,
    )  # fmt: skip


@torch.inference_mode()
def _loop(
    compiled: CompiledModel, ids: Tensor, lengths: Tensor | None, most: int, config: Any, streamer: Any,
    stopping: Any,
) -> Tensor:  # fmt: skip
    assert compiled.decoder is not None
    rows, start = ids.shape
    low, high = torch.aminmax(ids)
    if low < 0 or high >= compiled.decoder.config.vocab_size:
        raise UnsupportedError(f"token ids must lie between 0 and {compiled.decoder.config.vocab_size - 1}")
    most = min(most, max(1, compiled.decoder.context - start + 1))
    cache = compiled.new_cache(rows, max(start, min(start + most, compiled.decoder.context)))
    sampling, ends = _sampling(config), _ends(config)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    seed = int(torch.randint(1 << 31, ())) if sampling.temperature else 0
    out = torch.full((rows, start + most), pad, dtype=torch.int64)
    out[:, :start] = ids
    if streamer is not None:
        streamer.put(ids)
    logits = compiled.feed(ids, cache, 0, lengths, 1)
    alive = torch.ones(rows, dtype=torch.bool)
    finals = torch.tensor(ends) if len(ends) > 1 else None
    end = start
    for step in range(most):
        token = sampling.draw(logits[:, -1], out[:, :end], seed, step)
        if rows > 1 or step:
            token = torch.where(alive, token, pad) if rows > 1 else token
        out[:, end] = token
        end += 1
        if streamer is not None:
            streamer.put(token)
        if ends:
            alive &= token != ends[0] if finals is None else ~torch.isin(token, finals)
        for criterion in stopping:
            stop = criterion(out[:, :end], None)
            alive &= ~stop if isinstance(stop, Tensor) else torch.tensor(not stop)
        if step + 1 == most or not bool(alive.any()) or end > compiled.decoder.context:
            break
        valid = None if lengths is None else lengths + (end - start)
        logits = compiled.step(token.view(-1, 1), cache, end - 1, valid)
    if streamer is not None:
        streamer.end()
    return out[:, :end].clone()
