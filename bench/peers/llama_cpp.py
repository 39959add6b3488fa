"""llama.cpp (package llama-cpp-python) on the same file, in a process of its own, timed as llama-bench does.

The child (`python -m edgeformer.bench.peers.llama_cpp FILE`) answers one JSON line for each line it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

from ...compiler.errors import EdgeFormerError, UnsupportedError
from ..work import Test, Work, work_of_file

PACKAGE = "llama-cpp-python"
INSTALL = f'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary {PACKAGE} {PACKAGE}'
REBUILD = INSTALL.replace("pip install", "pip install --force-reinstall --no-deps --no-cache-dir")
# With gcc 12, version 0.3.36 loads tiles before it has configured them.
NO_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
REBUILD_WITHOUT_AMX = REBUILD.replace("-DGGML_NATIVE=ON", f"-DGGML_NATIVE=ON {NO_AMX}")
BATCH, UBATCH = 2048, 512  # llama-bench's defaults
TRIALS = 2  # timed runs of each flash-attention setting, to find the better one

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


class LlamaCppEngine:
    """A child process that holds the model in llama.cpp.

    Raises UnsupportedError when the package is missing, or when it was built without this CPU's
    instruction set; the text has the command that mends it.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int, context: int, batch: int = 1) -> None:
        from ...compiler.target import detect

        if importlib.util.find_spec("llama_cpp") is None:
            raise UnsupportedError(f"the peer llama.cpp is not installed: {INSTALL}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed in close()
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip
        self._path = path
        self._shape = {"threads": threads, "context": context, "batch": batch}
        self._flash: dict[Test, bool] = {}
        self._about: dict[str, Any] = {}
        try:
            self._about = self._ask({"do": "load", **self._shape})
            missing = missing_isa(self._about["system_info"], detect().features)
            if missing:
                raise UnsupportedError(
                    f"this build of llama.cpp does not use {', '.join(missing)} of this CPU, so a comparison "
                    f"would flatter us. Build it here: {REBUILD}"
                )
        except BaseException:
            self.close()
            raise

    def prepare(self, test: Test) -> dict[str, Any]:
        times: dict[bool, float] = {}
        for flash in (False, True):
            self._time(test, flash)
        for _ in range(TRIALS):
            for flash in (False, True):
                times[flash] = min(times.get(flash, float("inf")), self._time(test, flash))
        self._flash[test] = min(times, key=lambda flash: times[flash])
        return {"flash_attention": self._flash[test], "n_batch": BATCH, "n_ubatch": UBATCH, "kv": "fp16"}

    def run(self, test: Test) -> float:
        return self._time(test, self._flash[test])

    def _time(self, test: Test, flash: bool) -> float:
        return self._ask({"do": "time", "flash": flash, **vars(test)})["seconds"]

    def work(self) -> Work:
        return work_of_file(self._path, kv_element_bytes=2)

    def describe(self) -> dict[str, Any]:
        return {k: self._about[k] for k in ("version", "system_info", "model")}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._child.stdin:
                self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout:
            self._child.stdout.close()
        self._errors.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self._child.wait()
            self._errors.seek(0)
            said = self._errors.read().strip()[-600:] or "no word"
            code = self._child.poll()
            if code == -signal.SIGILL and "AMX_INT8 = 1" in self._about.get("system_info", ""):
                said = f"an illegal instruction in its AMX kernels; build it without: {REBUILD_WITHOUT_AMX}"
            raise EdgeFormerError(f"llama.cpp stopped (exit {code}): {said}")
        answer = json.loads(line)
        if "error" in answer:
            raise EdgeFormerError(f"llama.cpp: {answer['error']}")
        return answer


class Child:
    """The process that holds the model; one context a flash-attention setting, made when first asked for."""

    def __init__(self, path: str) -> None:
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

    def load(self, threads: int, context: int, batch: int) -> dict[str, Any]:
        self.shape = {"threads": threads, "context": context, "batch": batch}
        return {
            "version": importlib.metadata.version(PACKAGE),
            "system_info": self.api.llama_print_system_info().decode(),
            "model": self._description(),
        }

    def time(self, flash: bool, kind: str, tokens: int, depth: int, batch: int) -> dict[str, Any]:
        context = self.contexts.get(flash) or self._context(flash)
        api = self.api
        rng = random.Random(tokens)
        self._fill(context, flash, depth, batch)
        api.llama_synchronize(context)
        prompt = [rng.randrange(self.vocabulary) for _ in range(tokens)]
        start = time.perf_counter()
        if kind == "pp":
            self._prompt(context, prompt, 0, depth)
        else:
            self._generate(context, prompt, depth, batch)
        api.llama_synchronize(context)
        return {"seconds": time.perf_counter() - start}

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


def serve(path: str) -> None:
    """Answer questions until the input ends. Whatever the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child: Child | None = None
    for line in sys.stdin:
        question = json.loads(line)
        do = question.pop("do")
        try:
            child = child or Child(path)
            answer = child.load(**question) if do == "load" else child.time(**question)
        except Exception as error:  # noqa: BLE001  the parent raises it again
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
