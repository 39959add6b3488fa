"""ONNX Runtime (onnxruntime-genai): the model built as ONNX with 4-bit weights and int8 arithmetic.

transformers reads the file (a GGUF is dequantised), onnxruntime-genai's model builder writes an ONNX model
with MatMulNBits: 4-bit weights in groups of 32, activations rounded to int8 (`int4_accuracy_level` 4), the
fastest that its CPU provider has and the class of the others. It rounds the weights a second time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...compiler.errors import UnsupportedError
from ..child import ChildEngine, EngineKind, Patience, Shape, serve
from ..energy import Clock
from ..work import Test, Work, work_of_file
from .sampling import random_ids

KIND = EngineKind(
    name="onnxruntime", module=__name__, package="onnxruntime-genai",
    install="pip install onnxruntime-genai onnx-ir gguf accelerate 'edgeformer[hf]'",
    imports=("onnxruntime_genai", "onnx_ir", "transformers", "gguf", "accelerate"),
    packages=("onnxruntime", "onnxruntime-genai"),
)  # fmt: skip


class OnnxRuntimeEngine(ChildEngine):
    """A child process that holds the model in ONNX Runtime."""

    def __init__(self, path: Path, shape: Shape, patience: Patience | None = None, **options: Any) -> None:
        super().__init__(KIND, path, shape, patience, **options)


class OnnxRuntimeRunner:
    """The built model and a generator of so many sequences."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.folder = tempfile.TemporaryDirectory()
        self.api: Any = importlib.import_module("onnxruntime_genai")
        self.context, self.vocabulary = 1, 1

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        if self.path.suffix != ".gguf":
            raise UnsupportedError("onnxruntime is measured on GGUF files only")
        built = self.build(threads)
        self.open(built, context)
        return {
            "version": importlib.metadata.version("onnxruntime-genai"),
            "settings": [{}],
            "fixed": {"weights": "int4 groups of 32", "accuracy_level": 4},
            "work": asdict(self._work(built)),
        }

    def open(self, built: Path, context: int) -> None:
        """Load a built model."""
        self.context = context
        self.model = self.api.Model(str(built))

    def build(self, threads: int) -> Path:
        """Dequantise the file into a Hugging Face folder, and build the ONNX model from it."""
        import json

        import torch

        transformers: Any = importlib.import_module("transformers")
        source, built = Path(self.folder.name) / "hf", Path(self.folder.name) / "onnx"
        file = {"gguf_file": self.path.resolve().name, "local_files_only": True}
        folder = str(self.path.resolve().parent)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
        self.vocabulary = model.config.vocab_size
        settings = model.config.to_dict()  # what was read from a GGUF cannot be saved as it is
        settings.pop("quantization_config", None)
        plain = transformers.AutoModelForCausalLM.from_config(type(model.config).from_dict(settings))
        plain.float().load_state_dict(model.state_dict())
        plain.save_pretrained(source)
        transformers.AutoTokenizer.from_pretrained(folder, **file).save_pretrained(source)
        del model, plain
        self._run_builder(source, built)
        settings = json.loads((built / "genai_config.json").read_text())
        settings["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads}
        (built / "genai_config.json").write_text(json.dumps(settings))
        return built

    def _run_builder(self, source: Path, built: Path) -> None:
        """Run the builder by its command line, which stays the same while its functions change.

        Its defaults for int4 on a CPU are groups of 32 and accuracy level 4; the options' names change.
        """
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            str(source),
            "-o",
            str(built),
        ]
        command += ["-p", "int4", "-e", "cpu", "-c", str(Path(self.folder.name) / "cache"), "--extra_options"]
        command += ["hf_token=false"]
        found = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        if found.returncode or not (built / "genai_config.json").exists():
            words = (found.stderr or found.stdout).strip().splitlines()
            raise UnsupportedError(f"onnxruntime-genai's builder failed: {words[-1] if words else 'no word'}")

    def _work(self, built: Path) -> Work:
        base = work_of_file(self.path, kv_element_bytes=4)
        read = sum(f.stat().st_size for f in built.glob("*.onnx*"))
        return Work(read, base.kv_bytes, base.linear_weights, base.head_weights, base.num_layers,
                    base.attention_width)  # fmt: skip

    def _generator(self, batch: int) -> Any:
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, batch_size=batch, do_sample=False)
        return self.api.Generator(self.model, params)

    def time(self, test: Test, setting: Any, clock: Clock) -> None:
        import numpy as np

        generator = self._generator(test.batch)
        ids = random_ids(self.vocabulary, test.batch, test.length).astype(np.int32)
        if test.depth:
            generator.append_tokens(ids[:, : test.depth])
        if test.kind == "pp":
            prompt = np.ascontiguousarray(ids[:, test.depth :])
            with clock:
                generator.append_tokens(prompt)
            return
        steps = [np.ascontiguousarray(ids[:, i : i + 1]) for i in range(test.depth, test.length)]
        with clock:
            for token in steps:
                generator.append_tokens(token)

    def query(self, prompt: int, generate: int, batch: int, setting: Any) -> tuple[float, float]:
        import numpy as np

        generator = self._generator(batch)
        ids = random_ids(self.vocabulary, batch, prompt).astype(np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter() - start
        for _ in range(generate - 1):
            generator.generate_next_token()
        return first, time.perf_counter() - start

    def logits(self, ids: Sequence[int], out: Path, setting: Any) -> None:
        raise UnsupportedError("onnxruntime-genai gives the logits of the last token only")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(OnnxRuntimeRunner)
