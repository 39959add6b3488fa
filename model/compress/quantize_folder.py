"""`edgeformer quantize`: a model's weights rounded once and written as a folder in the canonical form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import WeightFormat
from ..load.folders import new_folder
from ..load.quantized import CONFIG, describe, stored
from ..load.saved_tokenizer import write_saved
from ..load.tokenizer import ModelTokenizer
from ..loading import open_checkpoint
from ..requantise import PROFILES, QuantisedCheckpoint

SHARD = 1 << 30  # bytes of a file


def quantize_model(
    path: str | Path,
    output: str | Path,
    *,
    profile: str = "int4",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Round a model's weights and write them, the tokenizer and the configuration to the folder `output`.

    Rounding is to nearest, with a search for the range of every group (see ``range_search``). Weights that
    are narrower already stay as they are. ``edgeformer.load(output)`` reads the folder on any machine.
    ``progress(done, total)`` counts matrices.

    Raises FormatError where `output` exists, UnsupportedError for an unknown profile; errors of ``load``.
    """
    if profile not in PROFILES:
        raise UnsupportedError(f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    try:
        import safetensors.torch as files
    except ImportError as error:
        raise UnsupportedError("quantize writes safetensors: pip install safetensors") from error
    checkpoint = QuantisedCheckpoint(open_checkpoint(path), profile)
    formats: dict[str, WeightFormat] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        names = list(checkpoint.config.matrices())
        for done, name in enumerate(names):
            weight = checkpoint.weight(name)
            formats[name] = weight.format
            for part, tensor in stored(weight).items():
                yield f"{name}.{part}", tensor
            if progress is not None:
                progress(done + 1, len(names))
        for name in checkpoint.config.vectors():
            yield name, checkpoint.vector(name)

    with new_folder(Path(output), is_own) as folder:
        shards: list[dict[str, Tensor]] = [{}]
        names: list[str] = []
        for name, tensor in tensors():
            if shards[0] and sum(t.nbytes for t in shards[0].values()) + tensor.nbytes > SHARD:
                names.append(f"model-{len(names) + 1:05}.safetensors")
                files.save_file(shards[0], folder / names[-1])
                shards = [{}]
            shards[0][name] = tensor
        last = f"model-{len(names) + 1:05}.safetensors" if names else "model.safetensors"
        files.save_file(shards[0], folder / last)
        if names:
            _write_index(folder, [*names, last])
        template = checkpoint.metadata.get("tokenizer.chat_template")
        data = describe(checkpoint.config, formats, profile, template if isinstance(template, str) else None)
        tokenizer = tokenizer_of(checkpoint)
        if tokenizer is not None:
            write_saved(folder, tokenizer)
        (folder / CONFIG).write_text(json.dumps(data, indent=1))
    return Path(output)


def tokenizer_of(checkpoint: QuantisedCheckpoint) -> ModelTokenizer | None:
    """A checkpoint's tokenizer, None where it has none that can be used."""
    make = getattr(checkpoint, "tokenizer", None)
    if make is not None:
        return make()
    if checkpoint.metadata.get("tokenizer.ggml.tokens"):
        return ModelTokenizer(checkpoint.metadata, checkpoint.path)
    return None


def is_own(folder: Path) -> bool:
    """Whether a folder is a quantised one, which may be replaced."""
    from ..load.json_file import read_object
    from ..load.quantized import MODEL_TYPE

    try:
        return read_object(folder / CONFIG).get("model_type") == MODEL_TYPE
    except FormatError:
        return False


def _write_index(folder: Path, names: list[str]) -> None:
    import safetensors

    table = {}
    for name in names:
        with safetensors.safe_open(folder / name, framework="pt") as file:
            table |= dict.fromkeys(file.keys(), name)
    text = json.dumps({"metadata": {}, "weight_map": table}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)
