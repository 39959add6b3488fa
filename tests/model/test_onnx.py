"""Folders for DirectML: the same logits as fp32 PyTorch through ONNX Runtime's CPU provider, and refusals."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import edgeformer
from edgeformer import cli
from edgeformer.compiler.backends.directml import fallbacks, support
from edgeformer.compiler.errors import CapacityError, EdgeFormerError, FormatError, UnsupportedError
from edgeformer.compiler.target import Target
from edgeformer.model import onnx_model
from edgeformer.model.compile_folder import compile_model
from edgeformer.model.decoder import Decoder
from edgeformer.model.evaluate import capped, reference_hidden
from edgeformer.model.load import manifest
from edgeformer.model.loading import open_checkpoint
from edgeformer.model.onnx_folder import CPU_MODEL, LONG, MODEL, compile_onnx, load_onnx
from edgeformer.model.onnx_model import OnnxModel
from edgeformer.runtime import onnx_session

from .families import FAMILIES, Family, checkpoint, hugging_face

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PROMPT = [5, 9, 120, 7, 33, 200, 18, 2, 64, 90, 11]
NEAR_TIE = 0.01  # of the logits' spread: where the two best are closer, either is right


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@functools.cache
def decoder_of(path: Path) -> Decoder:
    return Decoder.from_checkpoint(open_checkpoint(path))


def reference(path: Path, ids: list[int]) -> torch.Tensor:
    """fp32 logits [T, V] of a model file's dequantised weights."""
    decoder = decoder_of(path)
    hidden = reference_hidden(decoder, [torch.tensor(ids)])[0]
    return capped(hidden @ decoder.head.weight.unpack().dequantize().T, decoder.config.logit_softcap)


def operators_of(path: Path) -> Counter[str]:
    """How many nodes of each operator a model file has."""
    return Counter(node.op_type for node in onnx.load_model_from_string(path.read_bytes()).graph.node)


def compile_to(path: Path, folder: Path, **options: Any) -> Path:
    return compile_model(path, folder, target="directml", **{"activation": "float", **options})


@pytest.fixture(scope="module")
def compiled(make_gguf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the model's file, its folder): Q4_1 has minima, and the tied table is Q8_0."""
    path = make_gguf("Q4_1", types={"token_embd.weight": "Q8_0"}).path
    return path, compile_to(path, tmp_path_factory.mktemp("onnx") / "folder")


@pytest.fixture
def copy(compiled: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(compiled[1], tmp_path / "copy"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("F32", {}),
        ("Q4_0", {}),
        ("Q4_1", {"tied": False}),
        ("Q8_0", {"types": {"blk.0.attn_v.weight": "Q4_0"}}),
        ("Q5_1", {}),
        ("Q4_K", {"hidden": 256, "mlp": 256, "heads": 4, "types": {"token_embd.weight": "Q6_K"}}),
        ("Q2_K", {"hidden": 256, "mlp": 512, "heads": 4, "kv_heads": 2}),
        ("IQ4_NL", {}),
    ],
)
def test_formats_give_the_logits_of_fp32(
    kind: str, options: dict[str, Any], make_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    """Every format, its table too; the graph has no node that DirectML lacks."""
    path = make_gguf(kind, **options).path
    folder = compile_to(path, tmp_path / "folder")
    checked = manifest.read(folder)["checked"]
    assert checked["directml"] == [] and checked["error"] < 1e-4
    model = edgeformer.load(folder)
    assert isinstance(model, OnnxModel)
    expected = reference(path, PROMPT)
    got = model.prefill(PROMPT)
    assert error(got[0], expected[-1]) < 1e-4
    model.reset()
    model.prefill(PROMPT[:4])
    for token, row in zip(PROMPT[4:], expected[4:]):
        assert error(model.decode(token)[0], row) < 1e-4


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_families(family: Family, tmp_path: Path) -> None:
    """Windows, softcaps, norms of heads, biases, partial and scaled rotation: in DirectML's operators."""
    source: Any = checkpoint(hugging_face(family))
    source.metadata, source.path = {}, tmp_path / "model"
    assert compile_onnx(source, tmp_path / "folder", activation="float") == []
    folder = manifest.open_folder(tmp_path / "folder")
    assert folder.data["checked"]["error"] < 1e-4
    model = load_onnx(folder)
    assert isinstance(model, OnnxModel)
    operators = operators_of(tmp_path / "folder" / MODEL)
    if family.name in ("llama", "qwen3", "phi3-longrope"):
        assert operators["GroupQueryAttention"] == 3 and not operators["Softmax"]
    if family.name in ("gemma2", "gemma3", "mistral"):
        assert operators["Softmax"] > 0
    assert folder.data["checked"]["cpu_error"] < 1e-4
    for_cpu = model.session.operators()
    assert for_cpu["GroupQueryAttention"] + for_cpu["Softmax"] == 3
    if family.name == "gemma2":  # the CPU provider's attention reads softcaps, where there is no window
        assert for_cpu["GroupQueryAttention"] > operators["GroupQueryAttention"]


def test_the_cpus_graph_packs_heads_and_shares_the_tensors(
    make_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    """Heads of 16: turned inside of the attention; middle zero points left out; no tensor twice."""
    path = make_gguf("Q4_0", hidden=64, heads=4, kv_heads=2).path
    folder = compile_to(path, tmp_path / "folder", activation="auto")
    for name in (CPU_MODEL, LONG):
        found = operators_of(folder / name)
        assert not found["RotaryEmbedding"] and found["GroupQueryAttention"] > 0
    assert operators_of(folder / MODEL)["RotaryEmbedding"] > 0
    models = [onnx.load_model_from_string((folder / n).read_bytes()) for n in (MODEL, CPU_MODEL, LONG)]
    inputs = [{len(n.input) for n in m.graph.node if n.op_type == "MatMulNBits"} for m in models]
    assert inputs == [{4}, {3}, {3}]
    places = [{t.name: t.SerializeToString() for t in m.graph.initializer if t.external_data} for m in models]
    assert places[1] and all(places[0][name] == value for name, value in places[1].items())
    assert places[1] == places[2]
    old = Path(shutil.copytree(folder, tmp_path / "old"))  # as folders were before they had that graph
    data = json.loads((old / manifest.NAME).read_text())
    for name in (CPU_MODEL, LONG):
        (old / name).unlink()
        del data["files"][name]
    (old / manifest.NAME).write_text(json.dumps(data))
    assert error(edgeformer.load(old).prefill(PROMPT), edgeformer.load(folder).prefill(PROMPT)) < 0.05


def test_greedy_tokens_batches_and_chats(compiled: tuple[Path, Path], plain: Target) -> None:
    path, folder = compiled
    native = edgeformer.load(path, target=plain, kv="fp32", activation="float", whole_step=False)
    model = edgeformer.load(folder)
    want = native.generate(PROMPT, max_tokens=16, ignore_eos=True)
    assert model.generate(PROMPT, max_tokens=16, ignore_eos=True) == want
    ragged = [PROMPT, [3], PROMPT[:4]]
    together = model.generate(ragged, max_tokens=5, ignore_eos=True)
    assert together == [model.generate(row, max_tokens=5, ignore_eos=True) for row in ragged]
    messages = [{"role": "user", "content": "hello"}]
    said = model.chat(messages, max_tokens=4)
    assert said == native.chat(messages, max_tokens=4)
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "world"}]
    assert model.chat(messages, max_tokens=4) == native.chat(messages, max_tokens=4)
    assert model.last_run is not None and model.last_run.reused_tokens > 0
    assert {row["operator"] for row in model.report()} >= {"MatMulNBits", "GroupQueryAttention"}


def test_long_chunks_take_fp32_activations(
    compiled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both graphs work on one cache: a long chunk is exact, what follows it is rounded, and sees it."""
    model = edgeformer.load(compile_to(compiled[0], tmp_path / "auto", activation="auto"))
    expected = reference(compiled[0], PROMPT)
    assert 1e-4 < error(model.prefill(PROMPT)[0], expected[-1]) < 0.2
    model.reset()
    monkeypatch.setattr(onnx_model, "LONG", 8)
    assert error(model.prefill(PROMPT[:9])[0], expected[8]) < 1e-4
    for token, row in zip(PROMPT[9:], expected[9:]):
        assert error(model.decode(token)[0], row) < 0.2


def test_a_provider_whose_attention_sees_no_past_in_a_prompt(
    compiled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DirectML's rule on the CPU: whole prompts, later chunks token by token, no reuse of a chat's cache."""
    want = edgeformer.load(compiled[1]).generate(PROMPT, max_tokens=8, ignore_eos=True)
    monkeypatch.setattr(onnx_session.DecoderSession, "whole_prompts", True)
    model = edgeformer.load(compiled[1])
    assert model.chunk == model.context
    model.prefill(PROMPT[:5])
    whole = model.prefill(PROMPT[5:])
    model.reset()
    assert error(whole, model.prefill(PROMPT)) < 1e-4
    assert model.generate(PROMPT, max_tokens=8, ignore_eos=True) == want


def test_eval_compares_with_the_model_that_a_folder_came_from(compiled: tuple[Path, Path]) -> None:
    model, text = edgeformer.load(compiled[1]), "hello world " * 20
    with pytest.raises(UnsupportedError, match="--against"):
        edgeformer.evaluate(model, text, window=32)
    source = open_checkpoint(compiled[0])
    found = edgeformer.evaluate(model, text, window=32, reference=Decoder.from_checkpoint(source))
    assert found.mean_kl < 1e-6 and found.top1_agreement == 1.0


def test_caches_stay_in_place_and_contexts_end(compiled: tuple[Path, Path]) -> None:
    model = edgeformer.load(compiled[1], context=20)
    model.prefill(PROMPT)
    cache: Any = model._cache
    addresses = [value.data_ptr() for value in cache.rows[0].values]
    model.decode(1)
    assert model._cache is cache and cache.rows[0].tokens == len(PROMPT) + 1
    assert [value.data_ptr() for value in cache.rows[0].values] == addresses
    with pytest.raises(CapacityError, match="context"):
        model.prefill([1] * 10)
    with pytest.raises(CapacityError, match="compiled for a context of 96"):
        edgeformer.load(compiled[1], context=97)


def test_fp16_graphs_are_written(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    folder = compile_to(compiled[0], tmp_path / "half", kv="fp16")
    model = onnx.load_model(str(folder / MODEL), load_external_data=False)
    kinds = {value.type.tensor_type.elem_type for value in model.graph.input if "past" in value.name}
    assert kinds == {onnx.TensorProto.FLOAT16} and fallbacks(model) == []
    assert manifest.read(folder)["checked"]["error"] < 5e-2


def test_the_command_line(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = CliRunner(), tmp_path / "folder"
    made = run.invoke(cli.app, ["compile", str(compiled[0]), "--target", "directml", "-o", str(folder)])
    assert made.exit_code == 0 and "no nodes without a DirectML kernel" in made.stderr
    assert "from fp32 PyTorch's" in made.stderr
    answer = run.invoke(cli.app, ["run", str(folder), "--raw", "-p", "hello", "-n", "3", "--report"])
    assert answer.exit_code == 0 and "CPUExecutionProvider" in answer.stderr
    planned = run.invoke(cli.app, ["run", str(folder), "--dry-run"])
    assert planned.exit_code == 0 and "context" in planned.stdout
    (folder / MODEL).unlink()
    broken = run.invoke(cli.app, ["run", str(folder), "-p", "hello"])
    assert broken.exit_code == 2 and len(broken.stderr.strip().splitlines()) == 1


def test_options_that_the_route_lacks(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = compiled
    for options, match in (
        ({"kv": "bf16"}, "kv='bf16'.*fp32, fp16"),
        ({"activation": "half"}, "activation 'half'"),
        ({"context": 10_000}, "context 10000"),
    ):
        with pytest.raises(EdgeFormerError, match=match):
            compile_to(path, tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()
    loads: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kv": "fp16"}, "--kv fp32; compile it again with --kv fp16"),
        ({"activation": "int8"}, "--activation float"),
        ({"target": "znver4"}, "compiled for directml"),
        ({"quantize": "int4"}, "is compiled"),
    )
    for asked, match in loads:
        with pytest.raises(UnsupportedError, match=match):
            edgeformer.load(folder, **asked)


def damage(folder: Path, change: Callable[[Any], None], name: str) -> None:
    """Change a graph and make the manifest agree, as somebody would who means harm."""
    model = onnx.load_model(str(folder / name), load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    resign(folder, name)


def resign(folder: Path, name: str = MODEL) -> None:
    data = json.loads((folder / manifest.NAME).read_text())
    data["files"][name] = manifest.file_entry(folder / name)
    (folder / manifest.NAME).write_text(json.dumps(data))


def place(name: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == name).value = value

    return change


def in_a_constant(model: Any) -> None:
    """External data of a node's attribute, in a graph within a graph."""
    tensor = onnx.TensorProto(name="secret", data_type=1, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    inner = onnx.helper.make_graph([constant], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize("name", [MODEL, CPU_MODEL])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (place("location", "../weights.bin"), "outside of this folder"),
        (place("location", "/etc/passwd"), "outside of this folder"),
        (place("location", "..\\weights.bin"), "outside of this folder"),
        (place("location", "kernels/../../x"), "outside of this folder"),
        (place("location", "."), "outside of this folder"),
        (place("location", "other.bin"), "outside of this folder"),
        (place("offset", "99999999999"), "past the end"),
        (place("offset", "-4096"), "past the end"),
        (place("length", "nonsense"), "is damaged"),
        (in_a_constant, "outside of this folder"),
        (lambda model: model.graph.ClearField("node"), "no nodes"),
    ],
)
def test_a_model_that_points_elsewhere_is_refused(copy: Path, change: Any, match: str, name: str) -> None:
    damage(copy, change, name)
    with pytest.raises(FormatError, match=match):
        edgeformer.load(copy)


def test_a_graph_that_onnx_runtime_does_not_take_is_refused(copy: Path) -> None:
    damage(copy, lambda model: model.graph.node[3].input.append("nowhere"), CPU_MODEL)
    with pytest.raises(FormatError, match="ONNX Runtime cannot load"):
        edgeformer.load(copy)


def test_a_link_in_place_of_the_weights_is_refused(copy: Path) -> None:
    (copy / manifest.WEIGHTS).rename(copy.parent / "elsewhere.bin")
    (copy / manifest.WEIGHTS).symlink_to(copy.parent / "elsewhere.bin")
    with pytest.raises(FormatError, match="no plain file"):
        edgeformer.load(copy)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "flipped"])
def test_a_damaged_model_file_is_refused(copy: Path, kind: str) -> None:
    """A typed error, whether the manifest agrees or not; a flipped bit is found by the hash alone."""
    raw = bytearray((copy / MODEL).read_bytes())
    flipped = bytearray(raw)
    flipped[len(raw) // 3] ^= 4
    damaged = {"cut": raw[: len(raw) // 2], "text": b"{}", "empty": b"", "flipped": flipped}[kind]
    (copy / MODEL).write_bytes(bytes(damaged))
    with pytest.raises(FormatError, match="damaged|bytes, not"):
        edgeformer.load(copy)
    if kind != "flipped":
        resign(copy)
        with pytest.raises(FormatError, match="no ONNX model"):
            edgeformer.load(copy)


def test_damaged_weights_and_foreign_folders(copy: Path, tmp_path: Path) -> None:
    with open(copy / manifest.WEIGHTS, "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    with pytest.raises(FormatError, match="weights.bin is damaged"):
        edgeformer.load(copy)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").write_bytes(b"anything")
    with pytest.raises(FormatError, match="ONNX model of another tool.*--target directml"):
        edgeformer.load(other)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_says_what_to_install(
    compiled: tuple[Path, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=rf"{name} cannot be imported.*edgeformer\[onnx\]"):
        edgeformer.load(compiled[1])
    if name == "onnx":
        with pytest.raises(UnsupportedError, match="edgeformer"):
            compile_to(compiled[0], tmp_path / "folder")
    else:  # written, and the folder says that nobody has run it
        folder = compile_to(compiled[0], tmp_path / "folder")
        assert "error" not in manifest.read(folder)["checked"]


def node(op: str, inputs: list[str], domain: str = "", **attributes: Any) -> Any:
    return onnx.helper.make_node(op, inputs, ["out"], name="n", domain=domain, **attributes)


def graph_of(one: Any, types: dict[str, int]) -> Any:
    values = [onnx.helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in types.items()]
    out = [onnx.helper.make_tensor_value_info("out", 1, ["n"])]
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([one], "g", values, out)
    return onnx.helper.make_model(graph, opset_imports=opsets)


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (node("Add", ["f", "f"]), None),
        (node("Add", ["d", "d"]), "input 0 is float64"),
        (node("NonMaxSuppression", ["f", "f"]), "no such kernel"),
        (node("GatherBlockQuantized", ["u", "i", "f"], "com.microsoft"), "no such kernel"),
        (node("MatMulNBits", ["f", "u", "f", "u"], "com.microsoft", bits=4), None),
        (node("MatMulNBits", ["f", "u", "f"], "com.microsoft", bits=4), "3 inputs.*takes 4"),
        (node("MatMulNBits", ["f", "u", "f", ""], "com.microsoft", bits=4), "input 3 is left out"),
        (node("MatMulNBits", ["f", "u", "f", "f"], "com.microsoft", bits=4), "input 3 is float32"),
        (node("MatMulNBits", ["f", "u", "f", "u"], "com.microsoft", bits=2), "bits is 2"),
        (node("GroupQueryAttention", ["f", "f", "f", "f", "f", "i", "i"], "com.microsoft"), None),
        (node("GroupQueryAttention", ["f", "", "", "f", "f", "i", "i"], "com.microsoft"), "input 1"),
        (node("GroupQueryAttention", ["f", "f", "f", "f", "f", "i", "i"], "com.microsoft", do_rotary=1),
         "do_rotary is 1"),
        (node("GroupQueryAttention", ["f"] * 5 + ["i", "i"], "com.microsoft", local_window_size=8),
         "local_window_size is 8"),
    ],
)  # fmt: skip
def test_nodes_that_directml_lacks_are_named(one: Any, reason: str | None) -> None:
    kinds = {"f": 1, "d": 11, "u": 2, "i": 6}
    found = fallbacks(graph_of(one, kinds))
    if reason is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(reason, str(found[0]))


def test_the_table_of_kernels_is_sound() -> None:
    table = support()
    assert table["source"].startswith("https://") and table["kernels"].startswith("https://")
    names = set(table["types"]) | {kind for kinds in table["types"].values() for kind in kinds}
    for domain in table["operators"].values():
        for operator, (version, inputs, outputs) in domain.items():
            assert version >= 1 and inputs and outputs, operator
            for kind in inputs:
                assert set(kind if isinstance(kind, list) else [kind]) <= names, operator
            for kind in outputs:
                assert kind in names or (kind[0] == "=" and int(kind[1:]) < len(inputs)), operator
    assert set(table["limits"]) <= {op for domain in table["operators"].values() for op in domain}


REAL = [
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "January, February, March, April, May, June, July, August, September, October, November, "
    "December, January,",
]


@pytest.mark.real
@pytest.mark.parametrize("activation", ["int8", "float"])
def test_smollm2_gives_the_same_greedy_tokens(smollm2: Path, activation: str, tmp_path: Path) -> None:
    """The shipped Q4_1 file: each token is the reference's best one, or a near tie with it."""
    folder = compile_to(smollm2, tmp_path / "smollm2", context=128, activation=activation)
    model, compared = edgeformer.load(folder), 0
    for prompt in REAL:
        ids = model.tokenizer.encode(prompt)
        count = 24 if activation == "int8" else 8
        new = model.generate(ids, max_tokens=count, ignore_eos=True)
        logits = reference(smollm2, ids + new)[len(ids) - 1 : -1]
        best = logits.topk(2).values
        ties = (best[:, 0] - best[:, 1]) < NEAR_TIE * (logits.amax(-1) - logits.amin(-1))
        expected = logits.argmax(-1).tolist()
        assert [a == b or tie for a, b, tie in zip(new, expected, ties.tolist())] == [True] * count
        compared += count
        if activation == "float":
            model.reset()
            got = model.prefill(ids + new[:-1])[0]
            assert error(got, logits[-1]) < 1e-4
    assert compared >= 16
