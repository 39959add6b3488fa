"""llama.cpp (package llama-cpp-python) on the same file, timed as llama-bench does."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import random
import signal
import time
from collections.abc import Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...compiler.errors import UnsupportedError
from ..child import ChildEngine, EngineKind, Patience, Shape, serve
from ..energy import Clock
from ..work import Test, work_of_file

PACKAGE = "llama-cpp-python"
INSTALL = f'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary {PACKAGE} {PACKAGE}'
REBUILD = INSTALL.replace("pip install", "pip install --force-reinstall --no-deps --no-cache-dir")
# With gcc 12, version 0.3.36 loads tiles before it has configured them.
NO_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
REBUILD_WITHOUT_AMX = REBUILD.replace("-DGGML_NATIVE=ON", f"-DGGML_NATIVE=ON {NO_AMX}")
BATCH, UBATCH = 2048, 512  # llama-bench's defaults

# llama.cpp's name of an instruction set, and the CPU feature that should switch it on
ISA_FEATURES = {
    "AVX": "avx",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "NEON": "asimd",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
}


def missing_isa(system_info: str, features: Set[str]) -> list[str]:
    """Return the instruction sets that the CPU has and this llama.cpp build does not use."""
    built = {
        part.split("=")[0].split(":")[-1].strip()
        for part in system_info.split("|")
        if part.strip().endswith("1")
    }
    wanted = dict(ISA_FEATURES)
    if "avx512_vnni" not in features:
        wanted["AVX_VNNI"] = "avx_vnni"
    return [name for name, feature in wanted.items() if feature in features and name not in built]


KIND = EngineKind(
    name="llama.cpp", module=__name__, package=PACKAGE, install=INSTALL, imports=("llama_cpp",),
    packages=(PACKAGE,),
)  # fmt: skip


def rebuild_for(features: Set[str]) -> str:
    """Return the command that builds llama.cpp for these CPU features and no others (x86)."""
    names = [n for n in ISA_FEATURES if not n.startswith(("AVX512_", "NEON", "DOT", "MAT", "SVE"))]
    switches = {name: ISA_FEATURES[name] in features for name in names}
    switches |= {"BMI2": "bmi2" in features, "AVX_VNNI": "avx_vnni" in features}
    flags = " ".join(f"-DGGML_{name}={'ON' if on else 'OFF'}" for name, on in switches.items())
    return REBUILD.replace("-DGGML_NATIVE=ON", f"-DGGML_NATIVE=OFF {flags}")


class LlamaCppEngine(ChildEngine):
    """A child process that holds the model in llama.cpp.

    Raises UnsupportedError when the package is missing, or when it was built without the instruction set
    of `target` ("auto": this CPU); the text has the command that mends it.
    """

    def __init__(
        self, path: Path, shape: Shape, patience: Patience | None = None, target: str = "auto", **options: Any
    ) -> None:
        self.target = target
        super().__init__(KIND, path, shape, patience, **options)

    def accept(self) -> None:
        from ...compiler.target import Target, detect

        target = Target.parse(self.target)
        missing = missing_isa(self.about["system_info"], target.features)
        if missing:
            here = target is detect()
            raise UnsupportedError(
                f"this build of llama.cpp does not use {', '.join(missing)} of "
                f"{'this CPU' if here else target.name}, so a comparison would flatter us. "
                f"Build it here: {REBUILD if here else rebuild_for(target.features)}"
            )

    def last_words(self, code: int | None) -> str:
        if code == -signal.SIGILL and "AMX_INT8 = 1" in self.about.get("system_info", ""):
            return f"an illegal instruction in its AMX kernels; build it without: {REBUILD_WITHOUT_AMX}"
        return super().last_words(code)


class LlamaCppRunner:
    """The process that holds the model; one context a flash-attention setting, made when first asked for."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp")
        api = self.api
        self._silent = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._silent, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise UnsupportedError(f"cannot load {path}")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.contexts: dict[bool, Any] = {}
        self.shape: dict[str, int] = {}
        self.filled: dict[bool, tuple[int, int]] = {}

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        self.shape = {"threads": threads, "context": context, "batch": batch}
        return {
            "version": importlib.metadata.version(PACKAGE),
            "system_info": self.api.llama_print_system_info().decode(),
            "model": self._description(),
            "settings": [{"flash_attention": flash} for flash in (False, True)],
            "fixed": {"n_batch": BATCH, "n_ubatch": UBATCH, "kv": "fp16"},
            "work": asdict(work_of_file(self.path, kv_element_bytes=2)),
        }

    def time(self, test: Test, setting: Any, clock: Clock) -> None:
        flash = setting["flash_attention"]
        context = self.contexts.get(flash) or self._context(flash)
        rng = random.Random(test.tokens)
        self._fill(context, flash, test.depth, test.batch)
        self.api.llama_synchronize(context)
        prompt = [rng.randrange(self.vocabulary) for _ in range(test.tokens)]
        with clock:
            if test.kind == "pp":
                self._prompt(context, prompt, 0, test.depth)
            else:
                self._generate(context, prompt, test.depth, test.batch)
            self.api.llama_synchronize(context)

    def query(self, prompt: int, generate: int, batch: int, setting: Any) -> tuple[float, float]:
        flash, api = setting["flash_attention"], self.api
        context = self.contexts.get(flash) or self._context(flash)
        self._fill(context, flash, 0, batch)
        rng = random.Random(prompt)
        prompts = [[rng.randrange(self.vocabulary) for _ in range(prompt)] for _ in range(batch)]
        start = time.perf_counter()
        drawn = []
        for sequence, tokens in enumerate(prompts):
            self._prompt(context, tokens, sequence)
            drawn.append(self._likeliest(context, -1))
        api.llama_synchronize(context)
        first = time.perf_counter() - start
        for i in range(generate - 1):
            batch_of_tokens = self._batch([(t, prompt + i, s) for s, t in enumerate(drawn)], logits=None)
            self._decode(context, batch_of_tokens)
            drawn = [self._likeliest(context, s) for s in range(batch)]
            api.llama_batch_free(batch_of_tokens)
        return first, time.perf_counter() - start

    def _likeliest(self, context: Any, row: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def logits(self, ids: Sequence[int], out: Path, setting: Any) -> None:
        import numpy as np

        flash = setting["flash_attention"]
        context = self.contexts.get(flash) or self._context(flash)
        self._fill(context, flash, 0, 1)
        rows = []
        for start in range(0, len(ids), UBATCH):
            part = ids[start : start + UBATCH]
            batch = self._batch([(token, start + i, 0) for i, token in enumerate(part)], logits=None)
            self._decode(context, batch)
            found = self.api.llama_get_logits(context)
            rows.append(np.ctypeslib.as_array(found, shape=(len(part), self.vocabulary)).copy())
            self.api.llama_batch_free(batch)
        np.save(out, np.concatenate(rows))

    def _fill(self, context: Any, flash: bool, depth: int, batch: int) -> None:
        """Leave exactly `depth` tokens in the cache; those of the last test serve again."""
        api = self.api
        memory = api.llama_get_memory(context)
        if depth and self.filled.get(flash) == (depth, batch):
            for sequence in range(batch):
                api.llama_memory_seq_rm(memory, sequence, depth, -1)
            return
        api.llama_memory_clear(memory, True)
        rng = random.Random(depth)
        for sequence in range(batch if depth else 0):
            self._prompt(context, [rng.randrange(self.vocabulary) for _ in range(depth)], sequence)
        self.filled[flash] = (depth, batch)

    def _context(self, flash: bool) -> Any:
        api = self.api
        params = api.llama_context_default_params()
        params.n_ctx = self.shape["context"] * self.shape["batch"]
        params.n_seq_max = self.shape["batch"]
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_threads = params.n_threads_batch = self.shape["threads"]
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.no_perf = True
        context = api.llama_init_from_model(self.model, params)
        if not context:
            raise UnsupportedError(f"cannot make a context of {params.n_ctx} tokens")
        self.contexts[flash] = context
        return context

    def _prompt(self, context: Any, tokens: list[int], sequence: int, position: int = 0) -> None:
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            rows = [(token, position + start + i, sequence) for i, token in enumerate(part)]
            batch = self._batch(rows, logits=len(rows) - 1)
            self._decode(context, batch)
            self.api.llama_batch_free(batch)

    def _generate(self, context: Any, tokens: list[int], position: int, sequences: int) -> None:
        batch = self._batch([(0, 0, sequence) for sequence in range(sequences)], logits=None)
        for i, token in enumerate(tokens):
            for sequence in range(sequences):
                batch.token[sequence], batch.pos[sequence] = token, position + i
            self._decode(context, batch)
            self.api.llama_synchronize(context)
        self.api.llama_batch_free(batch)

    def _batch(self, rows: list[tuple[int, int, int]], logits: int | None) -> Any:
        """Return a batch of (token, position, sequence); logits of one row, of all for None."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = logits is None or i == logits
        return batch

    def _decode(self, context: Any, batch: Any) -> None:
        code = self.api.llama_decode(context, batch)
        if code:
            raise UnsupportedError(f"llama_decode returned {code}")

    def _description(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.api.llama_model_desc(self.model, text, 256)
        return text.value.decode()


if __name__ == "__main__":
    serve(LlamaCppRunner)
