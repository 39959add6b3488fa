"""OpenVINO: the GGUF file read by openvino-genai, run through OpenVINO's own Python API.

GenAI's reader turns a GGUF file into an OpenVINO model and can save it. That model is then run bare: prompts
and steps go into its inputs, without tokenising and sampling, as the other engines are timed. The reader
takes llama, qwen2 and qwen3 models with F16, Q8_0, Q4_0, Q4_1 (and some Q4_K, Q6_K) weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...compiler.errors import UnsupportedError
from ..child import ChildEngine, EngineKind, Patience, Shape, serve
from ..energy import Clock
from ..work import Test, work_of_file
from .sampling import greedy, random_ids

KIND = EngineKind(
    name="openvino", module=__name__, package="openvino-genai", install="pip install openvino-genai",
    imports=("openvino", "openvino_genai"), packages=("openvino", "openvino-genai"),
)  # fmt: skip
# The accuracy class of the others: activations rounded to int8 by groups of 32, or bf16; a 16-bit KV cache.
SETTINGS = (
    {"precision": "bf16", "dynamic_quantization": 32},
    {"precision": "f32", "dynamic_quantization": 32},
)


class OpenVinoEngine(ChildEngine):
    """A child process that holds the model in OpenVINO. Raises UnsupportedError when it is not installed."""

    def __init__(self, path: Path, shape: Shape, patience: Patience | None = None, **options: Any) -> None:
        super().__init__(KIND, path, shape, patience, **options)


class OpenVinoRunner:
    """The compiled models, one a setting, made when first asked for."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.folder = tempfile.TemporaryDirectory()
        self.api: Any = importlib.import_module("openvino")
        self.requests: dict[str, Any] = {}
        self.threads = 1

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        if self.path.suffix != ".gguf":
            raise UnsupportedError("openvino is measured on GGUF files only")
        self.threads = threads
        model = self._converted()
        self.model = self.api.Core().read_model(model)
        self.vocabulary = self.model.output("logits").partial_shape[-1].get_length()
        self._request(SETTINGS[0])
        return {
            "version": self.api.get_version(),
            "genai_version": importlib.metadata.version("openvino-genai"),
            "vocabulary": self.vocabulary,
            "settings": list(SETTINGS),
            "fixed": {"kv": "fp16", "performance_hint": "LATENCY"},
            "work": asdict(work_of_file(self.path, kv_element_bytes=2)),
        }

    def _converted(self) -> Path:
        """Let GenAI read the GGUF file and save what it made of it, beside a link to the file."""
        genai: Any = importlib.import_module("openvino_genai")
        folder = Path(self.folder.name)
        link = folder / "model.gguf"
        link.symlink_to(self.path.resolve())
        pipeline = genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
        del pipeline
        found = folder / "openvino_model.xml"
        if not found.exists():
            raise UnsupportedError("openvino-genai read the file but saved no model")
        return found

    def _request(self, setting: dict[str, Any]) -> Any:
        key = str(sorted(setting.items()))
        if key not in self.requests:
            properties = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self.threads,
                "INFERENCE_PRECISION_HINT": setting["precision"],
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": setting["dynamic_quantization"],
                "KV_CACHE_PRECISION": "f16",
            }
            compiled = self.api.Core().compile_model(self.model, "CPU", properties)
            self.requests[key] = compiled.create_infer_request()
        return self.requests[key]

    def _step(self, request: Any, ids: Any, position: int) -> Any:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens] behind `position` cached tokens."""
        import numpy as np

        batch, tokens = ids.shape
        positions = np.arange(position, position + tokens, dtype=np.int64)
        inputs = {
            "input_ids": np.ascontiguousarray(ids),
            "attention_mask": np.ones((batch, position + tokens), np.int64),
            "position_ids": np.ascontiguousarray(np.broadcast_to(positions, (batch, tokens))),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        return request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]

    def time(self, test: Test, setting: Any, clock: Clock) -> None:
        request = self._request(setting)
        request.reset_state()
        ids = random_ids(self.vocabulary, test.batch, test.length)
        if test.depth:
            self._step(request, ids[:, : test.depth], 0)
        with clock:
            if test.kind == "pp":
                self._step(request, ids[:, test.depth :], test.depth)
            else:
                for i in range(test.depth, test.length):
                    self._step(request, ids[:, i : i + 1], i)

    def query(self, prompt: int, generate: int, batch: int, setting: Any) -> tuple[float, float]:
        request = self._request(setting)
        request.reset_state()
        step = lambda ids, position: self._step(request, ids, position)[:, -1]  # noqa: E731
        return greedy(step, random_ids(self.vocabulary, batch, prompt), generate)

    def logits(self, ids: Sequence[int], out: Path, setting: Any) -> None:
        import numpy as np

        request = self._request(setting)
        request.reset_state()
        np.save(out, self._step(request, np.array([ids], dtype=np.int64), 0)[0])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(OpenVinoRunner)
