"""The comparison with other runtimes: what is recorded when one fails or is missing."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import measure, peer_runs, peers
from benchmarks.peer_runs import Job
from benchmarks.peers import Peer, Run
from larosa_compile import loading
from larosa_compile.evaluation import next_token_losses, perplexity
from tests.support.models import tiny_model, token_ids

JOB = Job("stand-in", "tiny", None, "bf16", 0.0, 1, "", [1, 2, 3], [[1, 2, 3, 4]], [])
TORCH = Peer("torch.compile", "torch", "bf16", "torch")

# A peer's process without a model: the job's runtime is a request, at which it dies in the way that `model` says.
STAND_IN = """
import json, os, signal, sys, time
job = None
for line in sys.stdin:
    request = json.loads(line)
    job = job or request
    step = next(iter(request))  # of the job itself that is "runtime"
    answer = {"seconds": [9.0] + [0.5] * (request.get("decode", 1) - 1), "losses": [1.0, 2.0], "bytes": 7}
    if step == job["runtime"]:
        if job["model"] == "hang":
            time.sleep(600)
        if job["model"] == "signal":
            os.kill(os.getpid(), signal.SIGILL)
        if job["model"] == "exit":
            print("not this\\nlast words", file=sys.stderr, flush=True)
            os._exit(3)
        answer = {"error": "ValueError: no such weights"}
    print(json.dumps(answer), flush=True)
"""


def run_that(at: str = "never", how: str = "", peer: Peer = TORCH, timeout: float = 60.0) -> Run:
    """A run in a process without a model, which fails at a request."""
    job = dataclasses.replace(JOB, runtime=at, model=how)
    return Run(peer, job, command=[sys.executable, "-c", STAND_IN], timeout=timeout)


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "bandwidth_gb_s", lambda repeats: 10.04)


@pytest.mark.parametrize("keep", [True, False])
def test_a_peer_that_runs(keep: bool) -> None:
    run, bandwidths, done = run_that(), list[float](), list[int]()
    peers.take_turns([run], 3, keep, bandwidths, lambda: done.append(len(run.rounds)))
    assert bandwidths == [10.0] * 4
    assert done == [0] * keep + [1, 2, 3, 3], "after every step, with what was measured so far"
    # the first token of a round does not count
    measured = {"tokens_per_s": 2.0, "spread": [2.0, 2.0], "ppl": perplexity([1.0, 2.0]), "skipped_reason": None}
    measured["bytes_per_token"] = 7
    given = {"peer": "torch.compile", "version": torch.__version__, "model": "tiny", "weights": "bf16", "sparsity": 0.0}
    assert run.record("tiny") == given | measured


def test_median_of_tokens_and_spread_of_rounds() -> None:
    record = Run(TORCH, JOB, rounds=[[1.0, 1.0, 8.0], [4.0, 4.0, 2.0]]).record("tiny")
    assert (record["tokens_per_s"], record["spread"]) == (1 / 3, [1 / 4, 1])


@pytest.mark.parametrize(
    ("at", "how", "reason"),
    [
        ("runtime", "exit", "its process exited with 3: last words"),
        ("decode", "exit", "its process exited with 3: last words"),
        ("decode", "error", "ValueError: no such weights"),
        ("losses", "exit", "perplexity: its process exited with 3: last words"),
        ("runtime", "signal", "its process was ended by SIGILL; built for another processor? pip install torch"),
        ("runtime", "hang", "killed: out of memory (try --restart), or no answer within 1 s"),
    ],
)
def test_a_crash_is_a_record_with_the_reason(at: str, how: str, reason: str) -> None:
    broken, other = run_that(at, how, timeout=1.0 if how == "hang" else 60.0), run_that()
    peers.take_turns([broken, other], 2, True, [])
    record = broken.record("tiny")
    assert record["skipped_reason"] == reason
    assert record["ppl"] is record["bytes_per_token"] is None
    assert record["tokens_per_s"] == (2.0 if at == "losses" else None)
    assert other.record("tiny")["tokens_per_s"] == 2.0


def test_a_missing_package_is_a_record_with_the_command_that_installs_it() -> None:
    peer = Peer("other", "torch", "int8", "larosa-compile-has-no-such-peer")
    run = Run(peer, JOB, peers.missing(peer, None), command=["no such command"])
    peers.take_turns([run], 1, True, [])
    record = run.record("tiny")
    assert record["skipped_reason"] == "not installed: pip install larosa-compile-has-no-such-peer"
    assert record["version"] is record["tokens_per_s"] is record["spread"] is record["ppl"] is None


def test_llama_cpp_is_built_for_what_the_processor_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "fma3": True, "f16c": False})
    command = 'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON" pip install llama-cpp-python'
    assert peer_runs.install_hint("llama-cpp-python") == command
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert peer_runs.install_hint("llama-cpp-python") == "pip install llama-cpp-python"


def test_what_reads_gguf_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "version", lambda package: "1")
    for peer in peers.peers(""):
        assert peers.missing(peer, None) == (peers.NO_GGUF if peer.name in ("llama.cpp", "openvino") else None)
        assert peers.missing(peer, "x.gguf") is None


def test_every_peer_has_a_runtime_and_a_precision() -> None:
    found = peers.peers("q4_k_m")
    assert len(set(found)) == len(found)
    assert {peer.runtime for peer in found} == set(peer_runs.RUNTIMES)
    assert {peers.bits(peer.weights) for peer in found} == {16, 8, 4}
    assert [peers.bits(name) for name in ("int8", "iq4_nl", "guessed")] == [8, 4, 0]
    assert set(found) - set(peers.peers("")) == {peer for peer in found if peer.weights == "q4_k_m"}


def test_rounds_alternate_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, order = [run_that(peer=dataclasses.replace(TORCH, name=name)) for name in "ab"], list[str]()
    monkeypatch.setattr(Run, "decode", lambda run: order.append(run.peer.name))
    peers.take_turns(runs, 3, False, [])
    assert "".join(order) == "abbaab"


def test_the_table_keeps_equal_precision_together() -> None:
    found = [Run(peer, JOB, "no").record("tiny") for peer in peers.peers("q4_1")]
    found[0] |= {"bytes_per_token": 1_234_567_890, "tokens_per_s": 12.34, "spread": [11.0, 13.0], "ppl": 9.876}
    text = io.StringIO()
    Console(width=150, file=text).print(peers.table(found, "tiny"))
    lines = [line for line in text.getvalue().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    column, precisions = [row[0] for row in cells], (16, 8, 4)
    starts = [column.index(f"{bits} bits") for bits in precisions]
    assert starts[0] == 0 and len(column) == len(found) + len(starts)
    for bits, start, end in zip(precisions, starts, [*starts[1:], None], strict=True):
        assert {peers.bits(weights) for weights in column[start + 1 : end]} == {bits}
    assert cells[1] == ["bf16", "torch.compile", torch.__version__, "0%", "1,235", "12.3", "11.0 to 13.0", "9.88"]
    assert "Compare within a block" in text.getvalue()


def test_main_writes_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Run(dataclasses.replace(TORCH, name="other", weights="int8"), JOB, "not installed: pip install [x]")
    monkeypatch.setattr(peers, "prepared", lambda *arguments: [run_that(), missing])
    monkeypatch.setattr(measure, "machine", lambda: {"device": "d", "threads": 1})
    monkeypatch.setattr(peers, "out", Console(width=110, file=io.StringIO()))
    monkeypatch.setattr(sys, "argv", ["peers", "--quick", "--json", str(tmp_path / "x.json")])
    peers.main()
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["meta"]["ppl_windows"] == 1
    assert written["meta"]["bandwidth_of_rounds_gb_s"] == [10.0] * 3
    assert [record["skipped_reason"] for record in written["records"]] == [None, "not installed: pip install [x]"]
    assert "other int8: not installed: pip install [x]" in peers.out.file.getvalue()  # type: ignore[attr-defined]


class Stub:
    def __init__(self, job: Job) -> None:
        if job.weights == "int8":
            raise ImportError("no library")
        self.decoded: list[int] = []
        self.predicts = job.weights == "f16"

    def decode(self, tokens: int) -> list[float]:
        self.decoded.append(tokens)
        return [0.5] * tokens

    def losses(self) -> list[float]:
        if not self.predicts:
            raise RuntimeError(f"after {self.decoded}")
        return [1.5]

    def weight_bytes(self) -> None:
        """Not known."""


def test_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_runs, "RUNTIMES", {"stand-in": Stub})
    job, answers = dataclasses.asdict(JOB), io.StringIO()
    requests = [job | {"weights": "int8"}, job, {"decode": 2}, {"losses": True}, {"decode": 1}]
    peer_runs.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"error": "ImportError: no library"},
        {"ready": True},
        {"seconds": [0.5, 0.5]},
        {"error": f"RuntimeError: after [{peer_runs.WARM_UP}, 2]"},
        {"seconds": [0.5]},
    ]
    answers = io.StringIO()
    requests = [job | {"weights": "f16"}, {"losses": True}]
    peer_runs.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    assert json.loads(answers.getvalue().splitlines()[-1]) == {"losses": [1.5], "bytes": None}


def test_torch_and_larosa_run_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = tiny_model("llama", num_hidden_layers=1), torch.compile
    monkeypatch.setattr(loading, "load_model", lambda source, dtype, device: model)

    def eager(model: Any, **arguments: Any) -> Any:
        if "backend" not in arguments:
            return model
        if "options" in arguments:
            arguments["options"] |= {"lowering": "eager"}
        return compiled(model, **arguments)

    monkeypatch.setattr(torch, "compile", eager)
    windows, calibration = token_ids(2, 12).tolist(), token_ids(4, 16).tolist()
    job = Job("torch", "", None, "bf16", 0.0, torch.get_num_threads(), str(tmp_path), [1, 2], windows, calibration)
    dense = peer_runs.Torch(job)
    assert len(dense.decode(3)) == 3
    expected = next_token_losses(model, [torch.tensor([window]) for window in windows])
    assert dense.losses() == expected
    linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert dense.weight_bytes() == sum(weight.nbytes for weight in linears)
    larosa = peer_runs.Torch(dataclasses.replace(job, runtime="larosa"))
    assert (tmp_path / "recipe.safetensors").exists()
    assert larosa.losses() == pytest.approx(expected, rel=1e-4)
    # a process may be given one, and the next finds the one that was made
    path = tmp_path / "recipe.safetensors"
    given = dataclasses.replace(job, runtime="larosa", sparsity=0.5, calibration=[], recipe=str(path), folder="none")
    half = peer_runs.Torch(given)
    at_half = half.losses()
    in_int8 = peer_runs.Torch(dataclasses.replace(given, weights="int8"))
    sizes = [one.weight_bytes() or 0 for one in (larosa, half, in_int8)]
    assert sizes[0] > sizes[1] > sizes[2] > 0, "fewer and fewer"
    again = peer_runs.Torch(dataclasses.replace(job, runtime="larosa", sparsity=0.5, calibration=[]))
    assert again.losses() == at_half != pytest.approx(expected, rel=1e-4)
    named = peers.peers("", [path])
    added = [peer for peer in named if peer not in peers.peers("")]
    assert [str(peer) for peer in added] == [f"larosa recipe {weights} 50%" for weights in ("bf16", "int8", "int4")]
    assert {peer.recipe for peer in added} == {str(path)}
    torch._dynamo.reset()
