"""The command line: what goes to stdout, what to stderr, and how errors end. No model is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from edgeformer import cli, console
from edgeformer.compiler.artifacts import ArtifactKey, ArtifactStore
from edgeformer.compiler.errors import BuildError, CapacityError

RUNNER = CliRunner()


@dataclass
class Model:
    """Stands for a LanguageModel: answers with what it was asked."""

    chat_template: str | None = "template"
    asked: list[Any] = field(default_factory=list)
    threads: int = 2
    whole_step_declined: str = "layers differ"
    types: list[dict[str, Any]] = field(default_factory=list)
    target: Any = field(default_factory=lambda: SimpleNamespace(name="test-cpu"))
    last_run: Any = field(
        default_factory=lambda: SimpleNamespace(
            prefill_speed=100.0, decode_speed=20.0, prompt_tokens=7, reused_tokens=0, new_tokens=3
        )
    )

    def generate(self, prompt: str, *, stream: Any, **sampling: Any) -> str:
        self.asked.append(("generate", prompt, sampling))
        return self._say(f"raw {prompt}", stream)

    def chat(self, messages: list[dict[str, str]], *, stream: Any, **sampling: Any) -> str:
        self.asked.append(("chat", [dict(m) for m in messages], sampling))
        return self._say(f"answer to {messages[-1]['content']}", stream)

    def report(self) -> list[dict[str, Any]]:
        same = {"weight": "int4 960 x 576", "operator": "quant_matmul", "spec": "n960 k576"}
        same |= {"form": "tvm_cpu", "backend": "tvm_llvm", "configuration": {"rows": 16}, "record": "default"}
        rows: list[dict[str, Any]] = [{"layer": f"layers.{i}.qkv", **same} for i in range(3)]
        odd = {"layer": "layers.3.qkv", **same, "declined": [("tvm_cpu", "odd size")]}
        return [*rows, odd, {"layer": "head", "operator": "quant_matmul", "form": "not bound yet"}]

    def _say(self, text: str, stream: Any) -> str:
        for piece in text.split(" "):
            stream(piece + " ")
        return text


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    fake = Model()
    monkeypatch.setattr(cli, "load_model", lambda *arguments: fake)
    return fake


def test_run_puts_the_answer_on_stdout_and_the_speed_on_stderr(model: Model):
    result = RUNNER.invoke(
        cli.app, ["run", "m.gguf", "-p", "hello", "-n", "5", "--seed", "3", "--top-k", "7"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "answer to hello \n"
    assert "prefill 100.0 tokens/s (7 tokens)" in result.stderr
    assert "decode 20.0 tokens/s (3 tokens)" in result.stderr
    assert "peak memory" in result.stderr
    kind, messages, sampling = model.asked[0]
    assert (kind, messages) == ("chat", [{"role": "user", "content": "hello"}])
    assert sampling == {
        "max_tokens": 5, "temperature": 0.0, "top_k": 7, "top_p": 1.0, "min_p": 0.0,
        "repetition_penalty": 1.0, "seed": 3,
    }  # fmt: skip


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_is_completed_with_raw_or_without_a_template(model: Model, raw: bool):
    if not raw:
        model.chat_template = None
    result = RUNNER.invoke(cli.app, ["run", "m.gguf", "-p", "Once", *(["--raw"] if raw else [])])
    assert result.exit_code == 0
    assert model.asked[0][:2] == ("generate", "Once")


def test_without_a_terminal_the_prompt_comes_from_stdin(model: Model):
    result = RUNNER.invoke(cli.app, ["run", "m.gguf"], input="from a pipe")
    assert result.exit_code == 0
    assert model.asked[0][1][0]["content"] == "from a pipe"


def test_chat_remembers_and_ends(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = iter(["first", "", "second", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    console.chat(model, raw=False, sampling={})  # pyright: ignore[reportArgumentType]
    assert [m["role"] for m in model.asked[1][1]] == ["user", "assistant", "user"]
    assert capsys.readouterr().out == "answer to first \nanswer to second \n"


def test_a_chat_that_is_too_long_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch):
    lines = iter(["long", "short", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    good = model.chat

    def chat(messages: list[dict[str, str]], **options: Any) -> str:
        if messages[-1]["content"] == "long":
            raise CapacityError("the prompt needs 9000 tokens")
        return good(messages, **options)

    monkeypatch.setattr(model, "chat", chat)
    console.chat(model, raw=False, sampling={})  # pyright: ignore[reportArgumentType]
    assert model.asked[0][1] == [{"role": "user", "content": "short"}]


def test_report_groups_equal_layers(model: Model):
    result = RUNNER.invoke(cli.app, ["run", "m.gguf", "-p", "hi", "--report"])
    assert result.exit_code == 0, result.output
    assert "layers.0-2.qkv" in result.stderr
    assert "layers.3.qkv" in result.stderr
    assert "odd size" in result.stderr
    assert "decode runs op by op: layers differ" in result.stderr
    assert "rows=16" in result.stderr
    assert "layers" not in result.stdout


def test_an_error_is_one_line_with_exit_code_2(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise BuildError("no linker: install gcc")

    monkeypatch.setattr(cli, "load_model", fail)
    result = RUNNER.invoke(cli.app, ["run", "m.gguf", "-p", "x"])
    assert result.exit_code == 2
    assert result.stderr == "error: no linker: install gcc\n"
    assert result.stdout == ""
    debugged = RUNNER.invoke(cli.app, ["--debug", "run", "m.gguf", "-p", "x"])
    assert isinstance(debugged.exception, BuildError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such-file.gguf", "-p", "x"],
        ["run", "no-such-file.gguf", "--dry-run"],
        ["run", "no-such-file.gguf", "-p", "x", "--target", "znver17"],
        ["bench", "model", "no-such-file.gguf", "-p", "5x"],
        ["bench", "model", "no-such-file.gguf", "-b", "0"],
        ["bench", "model", "no-such-file.gguf", "-p", "0", "-n", "0"],
        ["bench", "model", "no-such-file.gguf", "--peers", "nobody"],
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str]):
    result = RUNNER.invoke(cli.app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_a_file_that_is_no_model(tmp_path: Path):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"not a model" * 100)
    result = RUNNER.invoke(cli.app, ["run", str(path), "-p", "x"])
    assert result.exit_code == 2
    assert "noise.gguf" in result.stderr


@pytest.mark.real
def test_dry_run_tells_the_memory(smollm2: Path):
    result = RUNNER.invoke(cli.app, ["run", str(smollm2), "--dry-run", "--context", "1024"])
    assert result.exit_code == 0, result.output
    numbers = {line.split()[0]: float(line.split()[1]) for line in result.stdout.splitlines()}
    assert numbers["total"] == pytest.approx(
        numbers["weights"] + numbers["kv"] + numbers["workspace"], abs=0.2
    )
    assert numbers["context"] == 1024


@pytest.mark.real
def test_dry_run_refuses_what_does_not_fit(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgeformer.model.plan.available_memory", lambda: 50_000_000)
    result = RUNNER.invoke(cli.app, ["run", str(smollm2), "--dry-run"])
    assert result.exit_code == 2
    assert "50.0 MB are free" in result.stderr
    assert "weights" in result.stdout


def test_doctor_and_targets():
    facts = json.loads(RUNNER.invoke(cli.app, ["doctor", "-o", "json"]).stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert {"cpu", "isa", "linker", "back_ends", "memory_free"} <= facts.keys()
    assert "linker" in RUNNER.invoke(cli.app, ["doctor"]).stdout
    rows = json.loads(RUNNER.invoke(cli.app, ["targets", "-o", "json"]).stdout)
    assert rows[0]["name"] == "auto"
    assert rows[0]["runs_here"]
    assert "raspberry-pi-5" in RUNNER.invoke(cli.app, ["targets"]).stdout


def test_cache_lists_verifies_and_prunes(cache: Path):
    def write(folder: Path) -> None:
        (folder / "kernels.so").write_bytes(b"code")

    store = ArtifactStore()
    key = ArtifactKey("op", "form", "spec-1", "{}", "cpu", "1", "0")
    folder, stored = store.put(key, write)
    assert stored
    rows = json.loads(RUNNER.invoke(cli.app, ["cache", "list", "-o", "json"]).stdout)["kernels"]
    assert rows[0]["key"]["spec"] == "spec-1"
    assert RUNNER.invoke(cli.app, ["cache", "verify"]).exit_code == 0
    (folder / "kernels.so").write_bytes(b"worm")
    bad = RUNNER.invoke(cli.app, ["cache", "verify"])
    assert bad.exit_code == 2
    assert folder.name in bad.stdout
    assert RUNNER.invoke(cli.app, ["cache", "prune"]).exit_code == 0
    assert "kernel " not in RUNNER.invoke(cli.app, ["cache", "list"]).stdout


def test_version():
    assert RUNNER.invoke(cli.app, ["--version"]).stdout.startswith("edgeformer ")


def test_quantize_and_compile_say_what_they_would_take(smollm2: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    result = RUNNER.invoke(cli.app, ["quantize", str(smollm2), "-o", out, "--dry-run", "--json"])
    facts = json.loads(result.stdout)
    assert facts["weights_before"] == facts["weights_after"] > 90e6  # its weights have 4 bits already
    result = RUNNER.invoke(cli.app, ["compile", str(smollm2), "-o", out, "--dry-run", "--target", "znver4"])
    assert result.exit_code == 0 and "weights" in result.stdout
    assert not list(tmp_path.iterdir())


def test_doctor_says_what_limits_this_process():
    facts = json.loads(RUNNER.invoke(cli.app, ["doctor", "-o", "json"]).stdout)
    assert {"limits", "threads", "gpu", "cache", "back_ends", "versions", "warnings"} <= facts.keys()
    from edgeformer.bench.device import warnings_of

    assert "0.1.14" in warnings_of({"apache-tvm-ffi": "0.1.15"})[0]
    assert warnings_of({"apache-tvm-ffi": "0.1.14.post0", "torch": "2.13.0"}) == []
    assert "2.11" in warnings_of({"torch": "2.9.1"})[0]
