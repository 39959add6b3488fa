"""Compiled folders: the same tokens without compiling, and refusals of what is damaged, foreign or old."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeformer
from edgeformer.compiler.errors import (
    EdgeFormerError,
    FormatError,
    TargetError,
    TrustError,
    UnsupportedError,
)
from edgeformer.compiler.target import Target, detect
from edgeformer.model.load import manifest
from edgeformer.runtime import launch

PROMPT = [5, 9, 120, 7, 33, 200, 18, 2, 64, 90, 11]


@pytest.fixture(scope="module")
def compiled(make_gguf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the model's file, its compiled folder)."""
    path = make_gguf("Q4_0", types={"token_embd.weight": "Q8_0"}).path
    folder = tmp_path_factory.mktemp("compiled") / "folder"
    edgeformer.compile(path, folder)
    return path, folder


@pytest.fixture
def copy(compiled: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(compiled[1], tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / manifest.NAME).read_text())
    change(data)
    (folder / manifest.NAME).write_text(json.dumps(data))


def test_a_folder_gives_the_same_tokens_and_builds_nothing(compiled: tuple[Path, Path]):
    path, folder = compiled
    want = edgeformer.load(path).generate(PROMPT, max_tokens=12, ignore_eos=True)
    code = f"""
import sys, edgeformer
from edgeformer.runtime import launch
model = edgeformer.load({str(folder)!r})
assert model.whole_step_declined == "", model.whole_step_declined
out = model.generate({PROMPT}, max_tokens=12, ignore_eos=True)
ragged = model.generate([[1, 2, 3], [4]], max_tokens=3, ignore_eos=True)
drawn = model.generate([5, 6], max_tokens=3, temperature=0.8, repetition_penalty=1.2, ignore_eos=True)
assert launch.statistics["built"] == 0 and "tvm" not in sys.modules and "transformers" not in sys.modules
print(out)
"""
    cache = folder.parent / "empty-cache"
    env = dict(os.environ, EDGEFORMER_CACHE_DIR=str(cache))
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == want
    assert not cache.exists() or not list(cache.rglob("*.so"))


def test_weights_are_mapped_and_text_and_templates_travel(compiled: tuple[Path, Path]):
    path, folder = compiled
    model, source = edgeformer.load(folder), edgeformer.load(path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = model.decoder.embed.weight.buffer.data_ptr()
        lines = [line.split() for line in maps.read_text().splitlines() if manifest.WEIGHTS in line]
        spans = [[int(end, 16) for end in line[0].split("-")] for line in lines if str(folder) in line[-1]]
        assert any(start <= address < stop for start, stop in spans)
    assert model.decoder.head.weight is model.decoder.embed.weight
    assert model.chat_template == source.chat_template
    assert model.tokenizer.encode("hello world") == source.tokenizer.encode("hello world")
    assert model.stop_ids == source.stop_ids
    assert edgeformer.plan(folder).weights == (folder / manifest.WEIGHTS).stat().st_size


def test_compiling_again_replaces_the_folder_and_nothing_else(compiled: tuple[Path, Path], tmp_path: Path):
    path, _ = compiled
    edgeformer.compile(path, tmp_path / "out", kv="int8")
    edgeformer.compile(path, tmp_path / "out", kv="bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert json.loads((tmp_path / "out" / manifest.NAME).read_text())["options"]["kv"] == "bf16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FormatError, match="not written by this command"):
        edgeformer.compile(path, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_compile_leaves_nothing(
    compiled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from edgeformer.model import compile_folder

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_folder, "_write_weights", full)
    with pytest.raises(EdgeFormerError, match="No space left"):
        edgeformer.compile(compiled[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [manifest.WEIGHTS, "vocabulary.json", "kernels/launcher.so"])
@pytest.mark.parametrize("how", ["flip", "cut", "missing", "link"])
def test_damage_is_found(copy: Path, name: str, how: str):
    file = copy / name
    if how == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "missing":
        file.unlink()
    else:
        file.rename(copy / "elsewhere")
        file.symlink_to(copy / "elsewhere")
    with pytest.raises(FormatError):
        edgeformer.load(copy, trust=True).generate(PROMPT, max_tokens=2)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no POSIX permissions")
@pytest.mark.parametrize("name", [".", "kernels", "kernels/launcher.so", manifest.WEIGHTS])
def test_a_folder_that_others_can_write_needs_trust(copy: Path, name: str):
    os.chmod(copy / name, 0o777)
    with pytest.raises(TrustError, match="--trust"):
        edgeformer.load(copy)
    edgeformer.load(copy, trust=True)


def test_another_cpu_build_option_or_schema_is_refused(copy: Path):
    with pytest.raises(UnsupportedError, match="--kv bf16"):
        edgeformer.load(copy, kv="int8")
    with pytest.raises(UnsupportedError, match="packed"):
        edgeformer.load(copy, quantize="int4")
    other = "znver3" if detect().mcpu != "znver3" else "znver4"
    with pytest.raises(TargetError):
        edgeformer.load(copy, target=other)
    edit(copy, lambda data: data["target"]["features"].append("sixteen_bit_quantum"))
    with pytest.raises(TargetError, match="sixteen_bit_quantum"):
        edgeformer.load(copy)
    edit(copy, lambda data: data.update(sources="0" * 64))
    with pytest.raises(UnsupportedError, match="another build"):
        edgeformer.load(copy)
    edit(copy, lambda data: data.update(schema=99))
    with pytest.raises(UnsupportedError, match="schema"):
        edgeformer.load(copy)


def test_another_cpu_checks_itself_with_the_kernels_that_travelled(copy: Path):
    edit(copy, lambda data: data["checked"].update(cpu="another"))
    built = launch.statistics["built"]
    model = edgeformer.load(copy)
    assert model.whole_step_declined == ""
    assert launch.statistics["built"] == built


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(files={}),
        lambda d: d["files"].update({"../outside": {"bytes": 1, "sha256": ""}}),
        lambda d: d["files"].update({"weights.bin": {"bytes": 1 << 63, "sha256": ""}}),
        lambda d: d["files"].update({"x": []}),
        lambda d: d.update(kernels=[{"operator": 1}]),
        lambda d: d["kernels"][0].update(file="/bin/true"),
        lambda d: d["target"].update(features=[1]),
        lambda d: d["config"].update(num_layers=10**9),
        lambda d: d["config"].update(hidden_size="large"),
        lambda d: d["config"].update(unheard_of=1),
        lambda d: d["checkpoint"].update(weights={}),
        lambda d: d["checkpoint"]["weights"].update({"embed": [0, 1 << 62, 1 << 62]}),
        lambda d: d["weights"].update(packed={}),
        lambda d: d["weights"]["packed"].update({"embed": [1 << 62, 64, "n32.signed"]}),
        lambda d: d["weights"]["tensors"].update({"norm.weight": [-64, "float32", [128]]}),
        lambda d: d["options"].update(context=-1),
    ],
)
def test_a_damaged_manifest_is_a_typed_error(copy: Path, change: Callable[[dict[str, Any]], Any]):
    edit(copy, change)
    with pytest.raises(EdgeFormerError):
        edgeformer.load(copy)


NO_MANIFESTS = ["", "[]", "{", '{"kind": "compiled", "schema": 1}', "[" * 100_000, "\x00\xff"]


@pytest.mark.parametrize("text", NO_MANIFESTS)
def test_a_manifest_that_is_no_manifest(copy: Path, text: str):
    (copy / manifest.NAME).write_text(text)
    with pytest.raises(FormatError):
        edgeformer.load(copy)


@pytest.mark.real
def test_compiling_for_another_target(compiled: tuple[Path, Path], tmp_path: Path):
    other = "znver3" if detect().mcpu != "znver3" else "znver4"
    folder = edgeformer.compile(compiled[0], tmp_path / "other", target=other)
    data = json.loads((folder / manifest.NAME).read_text())
    runs_here = not Target.parse(other).missing_on(detect())
    assert data["target"]["name"] == other and bool(data["checked"]) == runs_here
    operators = {kernel["operator"] for kernel in data["kernels"]}
    assert {"decoder_step", "sampling", "norm", "quant_matmul", "attention"} <= operators
