"""Tuning a model for this machine: its whole step and its operators, timed as the model runs them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..compiler.errors import UnsupportedError
from ..compiler.operator import Operator, Sizes, reference_form
from ..compiler.records import RecordStore, policy
from ..compiler.target import Target
from ..compiler.tuner import Event, Outcome, Problem
from ..kernels.attention import OPERATOR as ATTENTION
from ..kernels.attention import AttentionSpec
from ..kernels.attention.space import fastest_math
from ..kernels.decoder_step import DECODE, TVM_CPU, DecoderStepSpec
from ..kernels.quant_matmul import OPERATOR as QUANT_MATMUL
from ..kernels.quant_matmul import QuantMatmulSpec, WeightFormat
from ..kernels.quant_matmul.space import fastest_activation
from ..kernels.shared.memory import large_page_empty
from ..runtime import recorded, registry
from ..runtime.kv_cache import KVCache
from ..runtime.program import TUNED_SIZES
from ..runtime.tuning import problem_of, tune_problems
from .compiled import KV_NAMES, CompiledDecoder, chunk_spec, self_check, step_spec
from .decoder import Decoder
from .dropin.layers import GatedMLP, Linear
from .generate import LanguageModel
from .layers import QuantLinear
from .loading import load_as_it_is, open_checkpoint
from .plan import plan_memory
from .requantise import QuantisedCheckpoint
from .tuned_speed import changed, side_by_side, speeds

PROVIDER = "edgeformer.model.tuning:tunable"
_STEP_LENGTHS, _CHUNK_LENGTHS = (1,) * 6, (17, 40, 9)  # of a check: tokens of each call
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# M of the products that are tuned one by one, with their weight. What is best at 8 rows may compute for 8
# where there are 4: the record of 4 is nearer to 2 to 4 than that of 8.
_ROWS = {1: 0.2, 4: 0.05, 8: 0.05, 512: 0.1}
_DECODE_WEIGHT, _PREFILL_WEIGHT = 0.6, 0.3
_ATTENTION = {(1, 512): 0.3, (1, 4096): 0.3, (512, 512): 0.15, (4096, 4096): 0.15}  # queries, keys: weight
BUDGET = "2m"  # of a tuning that EDGEFORMER_TUNE=on starts; EDGEFORMER_TUNE_BUDGET overrides


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """The whole step of one model file: the problem `spec`, and how to load what brings its weights."""

    spec: DecoderStepSpec
    options: tuple[tuple[str, Any], ...]

    def key(self) -> str:
        """One line that names the problem."""
        return self.spec.key()


def tunable() -> dict[str, Operator]:
    """Return the operators that can be tuned, with the whole step of a model."""
    given = TVM_CPU.tuning
    assert given is not None and TVM_CPU.lower is not None
    lower = TVM_CPU.lower
    form = dataclasses.replace(
        TVM_CPU,
        decide=lambda step, target: TVM_CPU.decide(step.spec, target),
        space=lambda step, target: TVM_CPU.space(step.spec, target),
        lower=lambda step, configuration, target: lower(step.spec, configuration, target),
        bind=_bind,
        tuning=dataclasses.replace(
            given,
            phase=lambda step, sizes: given.phase(step.spec, sizes),
            family=lambda step, target: given.family(step.spec, target),
            functions=lambda step, phase: given.functions(step.spec, phase),
            workload=StepWorkload,
            check=_check,
        ),
    )
    none = reference_form(lambda step, *ignored: None)
    return registry.tunable() | {"decoder_step": Operator("decoder_step", ModelStep, _check, (form, none))}


@functools.lru_cache(maxsize=1)
def _model(options: tuple[tuple[str, Any], ...]) -> LanguageModel:
    return load_as_it_is(**dict(options), whole_step=False)


def _bind(step: ModelStep, configuration: Any, target: Target, library: Any) -> CompiledDecoder:
    """Return the model's compiled decoder over one built library."""
    model, given = _model(step.options), dict(configuration)
    return CompiledDecoder(
        model.decoder, target, model.kv, configuration=given, chunk_configuration=given,
        libraries=(library, library),
    )  # fmt: skip


def _check(step: ModelStep, sizes: Sizes, target: Target, call: Any, seed: int) -> str:
    """Compare layers, head and embedding with the eager decoder; each seed in another order."""
    lengths = _STEP_LENGTHS if sizes["m"] == 1 else _CHUNK_LENGTHS
    lengths = lengths[seed % 3 :] + lengths[: seed % 3]
    model = _model(step.options)
    return self_check(call, model.decoder, model.kv, lengths)


class StepWorkload:
    """Steps of one token at a context, or chunks of a prompt, of the model itself: what one waits for."""

    def __init__(self, step: ModelStep, sizes: Sizes, target: Target, cache_bytes: int) -> None:
        model = _model(step.options)
        config, self._rows = model.config, sizes["m"]
        self._at = sizes["tk"] - self._rows
        capacity = sizes["tk"]
        self._cache = KVCache(
            config.num_layers, 1, config.num_kv_heads, config.head_dim, capacity, dtype=model.kv
        )
        for i in range(config.num_layers):
            for tensor in (self._cache.layer(i).k, self._cache.layer(i).v):
                tensor.view(torch.uint8).zero_()
            for scale in (self._cache.layer(i).k_scale, self._cache.layer(i).v_scale):
                if scale is not None:
                    scale.fill_(1.0)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, config.vocab_size, (1, self._rows), generator=generator)
        self._rope = model.decoder.rope_rows(self._at, capacity, None)
        self._probed = large_page_empty(cache_bytes)  # the weights may fit a cache, as they do in use
        self._probed.fill_(1)
        self.area = self._probed.data_ptr(), self._probed.numel()
        self.copies = 1
        self.nbytes = model.memory()["weights"]
        self.operations = (
            2
            * self._rows
            * sum(
                m.weight.n * m.weight.k for m in model.decoder.layers.modules() if isinstance(m, QuantLinear)
            )
        )
        self.arithmetic = step.spec.activation

    @torch.inference_mode()
    def run(self, call: CompiledDecoder, index: int) -> Any:
        """Run one step, or one chunk."""
        head = self._rows == 1
        return call.program.run(self._cache, self._at, *self._rope, ids=self._ids, head=head)


def problems(
    model: LanguageModel, options: dict[str, Any], operators: Iterable[str] | None = None
) -> list[Problem]:
    """Return what there is to tune in a loaded model, the most important first.

    Where the whole step is compiled, that is tuned as one; else products and attention of the layers one by
    one.
    """
    wanted = set(operators) if operators is not None else None
    known = {"attention", "decoder_step", "quant_matmul"}
    if wanted is not None and (unknown := wanted - known):
        raise UnsupportedError(
            f"unknown operators {', '.join(sorted(unknown))}; a model has {', '.join(sorted(known))}"
        )
    found: list[Problem | None] = []
    if model.whole_step_declined == "" and (wanted is None or "decoder_step" in wanted):
        found += _step_problems(model, options)
    one_by_one = {"attention", "quant_matmul"} if wanted is None and not found else wanted or set()
    if "quant_matmul" in one_by_one:
        found += _product_problems(model)
    if "attention" in one_by_one:
        found += _attention_problems(model)
    return [problem for problem in found if problem is not None]


def _step_problems(model: LanguageModel, options: dict[str, Any]) -> list[Problem | None]:
    operator, found = tunable()["decoder_step"], []
    few = step_spec(model.decoder, model.kv)
    many = chunk_spec(model.decoder, model.kv, model.target) or few
    weights = (_DECODE_WEIGHT, _PREFILL_WEIGHT)
    for spec, sizes, weight, name in zip((few, many), TUNED_SIZES, weights, (DECODE, "prefill")):
        if sizes["tk"] > model.context:
            continue
        title = f"{name} step, {sizes['m']} tokens at a context of {sizes['tk']}"
        step = ModelStep(spec, tuple(sorted(options.items())))
        problem = problem_of(operator, step, sizes, model.target, model.threads, weight, title)
        if problem is not None:
            request = dataclasses.replace(problem.request, provider=PROVIDER)
            found.append(dataclasses.replace(problem, request=request))
    return found


def _product_problems(model: LanguageModel) -> list[Problem | None]:
    found: dict[tuple[QuantMatmulSpec, int], Problem | None] = {}
    for layer in model.decoder.modules():
        if isinstance(layer, QuantLinear):
            for spec, m in layer_specs(layer, model.target):
                if (spec, m) not in found:
                    found[spec, m] = problem_of(
                        QUANT_MATMUL, spec, {"m": m}, model.target, model.threads, _ROWS[m]
                    )
    return list(found.values())


def _attention_problems(model: LanguageModel) -> list[Problem | None]:
    """Return one problem for each kind of layer (window or not), phase and context that the model holds."""
    found = []
    for windowed in dict.fromkeys(bool(window) for window in model.config.windows):
        for (tq, tk), weight in _ATTENTION.items():
            if tk <= model.context:
                spec = attention_spec(model, windowed, tq)
                sizes = {"tq": tq, "tk": tk}
                found.append(problem_of(ATTENTION, spec, sizes, model.target, model.threads, weight))
    return found


def attention_spec(model: LanguageModel, windowed: bool, queries: int) -> AttentionSpec:
    """Return the problem that the model's layers bind for a number of queries."""
    c, kv = model.config, KV_NAMES[model.kv]
    head: Any = model.decoder.head
    math = fastest_math(queries, kv, model.target) if head.activation == "auto" else "float32"
    return AttentionSpec(
        c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim, "float32", kv, "causal", "blocked", windowed,
        bool(c.attention_softcap), math=math,
    )  # fmt: skip


def planned_problems(
    path: str | Path,
    target: Target,
    threads: int,
    operators: Sequence[str] | None = None,
    *,
    context: int | None = None,
    kv: str = "bf16",
    quantize: str | None = None,
    activation: str = "auto",
) -> list[Problem]:
    """Return the problems of a model's products and attention on a target that need not run here.

    Its whole step is not among them: that takes the model on the device. Raises as ``load`` does.
    """
    known = ("attention", "quant_matmul")
    if unknown := set(operators or ()) - set(known):
        raise UnsupportedError(f"{', '.join(sorted(unknown))} cannot be tuned there; {', '.join(known)} can")
    checkpoint: Any = QuantisedCheckpoint(open_checkpoint(path), quantize)
    plan = plan_memory(checkpoint, context=context, kv=kv)
    decoder = Decoder.from_checkpoint(checkpoint, context=plan.context, target=target, activation=activation)
    model = LanguageModel(
        decoder.eval(), checkpoint.path, checkpoint.metadata, plan, target=target, threads=threads, kv=kv
    )
    found: list[Problem | None] = []
    if operators is None or "quant_matmul" in operators:
        found += _product_problems(model)
    if operators is None or "attention" in operators:
        found += _attention_problems(model)
    return [problem for problem in found if problem is not None]


def layer_specs(layer: QuantLinear, target: Target) -> list[tuple[QuantMatmulSpec, int]]:
    """Return (problem, M) of a layer at the numbers of rows that are tuned."""
    found, w = [], layer.weight
    for m in _ROWS:
        activation = _activation(layer.activation, m, w.format, target)
        flags = (layer.bias is not None, layer.residual, layer.softcap)
        found.append((QuantMatmulSpec(w.n, w.k, w.format, activation, "float32", layer.epilogue, *flags), m))
    return found


def _activation(given: str, rows: int, weight: WeightFormat, target: Target) -> str:
    """Return the activation type that a layer's product of so many rows has."""
    if given == "auto":
        return fastest_activation(rows, weight, target)
    return "float" if weight.is_float else given


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `tune` did: an outcome a problem, and the model's tokens a second before and after."""

    outcomes: tuple[Outcome, ...]
    before: dict[str, float]
    after: dict[str, float]

    @property
    def trials(self) -> int:
        """Configurations that were tried now."""
        return sum(outcome.trials for outcome in self.outcomes)


def tune(
    path: str | Path,
    *,
    budget: float | str = "10m",
    target: str | Target = "auto",
    threads: int | None = None,
    context: int | None = None,
    kv: str = "bf16",
    quantize: str | None = None,
    activation: str = "auto",
    operators: Sequence[str] | None = None,
    more: bool = False,
    progress: Callable[[Event], None] | None = None,
) -> Tuned:
    """Search for faster configurations of a model's kernels on this machine and keep them as records.

    Args:
        path: the model's file; the other options are those of ``load``.
        budget: seconds, or a text such as "90s", "10m", "1h".
        operators: "decoder_step", "quant_matmul", "attention"; default: what runs the model.
        more: also go on with problems that have a record already.
        progress: called with an Event for every problem, trial and record.

    Every candidate runs in a process of its own, is compared with the reference before it may win, and has to
    beat what ran before by more than the spread. A second call finds the records and tries nothing.
    Ctrl-C (KeyboardInterrupt) keeps every trial that ended.

    Raises:
        UnsupportedError: a budget or an operator that makes no sense.
        EdgeFormerError: as ``load`` does.
    """
    seconds = budget_seconds(budget)
    resolved = Target.parse(target)
    resolved.require_cpu("tuning for")
    options = {
        "path": str(Path(path).resolve()), "target": resolved, "context": context, "kv": kv,
        "threads": threads, "quantize": quantize, "activation": activation,
    }  # fmt: skip
    model = load_as_it_is(**options)
    found = problems(model, options | {"threads": model.threads}, operators)
    before, earlier = speeds(model), recorded.known()
    del model
    outcomes = tune_problems(found, seconds=seconds, more=more, progress=progress)
    recorded.forget()
    if not changed(outcomes, earlier):
        return Tuned(tuple(outcomes), before, before)
    return Tuned(tuple(outcomes), *side_by_side(load_as_it_is(**options), earlier))


def on_demand() -> float:
    """Return the seconds that EDGEFORMER_TUNE=on gives to tuning now, 0.0 with another policy."""
    if policy() != "on":
        return 0.0
    return budget_seconds(os.environ.get("EDGEFORMER_TUNE_BUDGET") or BUDGET)


def _missing(found: Sequence[Problem]) -> list[Problem]:
    own = {record.key for record, origin in RecordStore().all() if origin == "yours"}
    return [problem for problem in found if problem.key not in own]


def _tune_missing(missing: Sequence[Problem]) -> int:
    """Tune within the policy's budget; return how many problems have a record now."""
    seconds = on_demand()
    warnings.warn(
        f"EDGEFORMER_TUNE=on: {len(missing)} problems have no record; tuning takes up to {seconds:.0f} s",
        RuntimeWarning,
        stacklevel=4,
    )
    outcomes = tune_problems(missing, seconds=seconds)
    recorded.forget()
    return sum(outcome.state == "tuned" for outcome in outcomes)


def tune_loaded(make: Callable[[], LanguageModel], options: dict[str, Any]) -> LanguageModel:
    """Return the model that `make` loads; what it lacks records of is tuned first (EDGEFORMER_TUNE=on)."""
    model = make()
    missing = _missing(problems(model, options | {"threads": model.threads}))
    if not missing:
        return model
    del model  # the child process holds one of its own
    _tune_missing(missing)
    return make()


def tune_replaced(model: torch.nn.Module, target: Target, dtype: str) -> int:
    """Tune the products of a model whose layers were replaced; return how many problems were tuned."""
    found: dict[tuple[QuantMatmulSpec, int], Problem | None] = {}
    for layer in model.modules():
        if not isinstance(layer, Linear | GatedMLP):
            continue
        w, bias = layer.weight, isinstance(layer, Linear) and layer.bias is not None
        epilogue = layer.epilogue if isinstance(layer, GatedMLP) else "none"
        for m, weight in _ROWS.items():
            activation = _activation(layer.activation, m, w.format, target)
            spec = QuantMatmulSpec(w.n, w.k, w.format, activation, dtype, epilogue, bias)
            if (spec, m) not in found:
                found[spec, m] = problem_of(
                    QUANT_MATMUL, spec, {"m": m}, target, torch.get_num_threads(), weight
                )
    missing = _missing([problem for problem in found.values() if problem is not None])
    return _tune_missing(missing) if missing else 0


def budget_seconds(budget: float | str) -> float:
    """Return the seconds of a budget such as 600, "90s", "10m" or "1h". Raises UnsupportedError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(budget))
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if not 0 < seconds <= 7 * 24 * 3600:
        raise UnsupportedError(f"a budget of {budget!r}: use seconds, or a text such as 90s, 10m or 1h")
    return seconds
