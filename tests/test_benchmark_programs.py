"""The benchmarks of kernels and of decoding: what they build, record and refuse, on tiny shapes; never how fast."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import decode, decoding, kernels, measure, perplexity, shapes
from benchmarks.decoding import ATTENTION, DENSE, GENERATED, GROUPS, SPARSE, Subject, Variant
from larosa_compile import machine
from larosa_compile.decoding import Prompt
from larosa_compile.recipe import Recipe

TINY = shapes.Shape("llama", 64, 160, 2, 4, 2, 96, True)
UNTIED = shapes.Shape("qwen2", 64, 160, 2, 4, 2, 96, False)

DECODE_FIELDS = {
    *("model", "layers", "variant", "sparsity", "guarded", "context", "tokens_per_s", "spread", "ms_per_token"),
    *("bytes_per_token", "bandwidth_gb_s", "bandwidth_bound_ms", "over_bound", "vs_inductor"),
    *("compile_s", "peak_rss_mb", "rss_mb", "split"),
}
# Parameters of the published models.
PUBLISHED = {
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "qwen-0.5b": 494_032_768,
    "qwen-1.5b": 1_543_714_304,
    "qwen-7b": 7_615_616_512,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes beside the known ones, and little memory to read."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.SHAPES, "untied", UNTIED)
    monkeypatch.setattr(shapes, "DRAWN", 10_007)
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)


def shown(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_line_is_that_of_least_squares(noise: float) -> None:
    x = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    y = [2 * value - 5 + noise * (index % 3) for index, value in enumerate(x)]
    line = measure.Line.through(x, y)
    slope, intercept = numpy.polyfit(x, y, 1)
    assert line is not None
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    residuals = numpy.asarray(y) - (slope * numpy.asarray(x) + intercept)
    assert line.r2 == pytest.approx(1 - residuals.var() / numpy.var(y))
    for few in ([], [1.0, 2.0], [2.0, 2.0, 2.0]):
        assert measure.Line.through(few, [1.0] * len(few)) is None


def test_vector_flags_and_peak_memory() -> None:
    intel = ["processor : 0", "flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 amx_tile", "flags : other"]
    assert measure.vector_flags(intel) == ["amx_tile", "avx2", "avx512_bf16", "avx512f"]
    assert measure.vector_flags(["Features\t: fp asimd sve sve2 atomics"]) == ["asimd", "sve", "sve2"]
    held = torch.ones(50_000_000, dtype=torch.uint8)
    with_it = measure.peak_rss_mb()
    assert held.nbytes / 1e6 < with_it < 100_000
    del held
    measure.forget_peak()
    if sys.platform == "linux":
        assert measure.peak_rss_mb() < with_it


@pytest.mark.parametrize("name", [*PUBLISHED, "tiny", "untied"])
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    shape = shapes.SHAPES[name]
    model = shapes.skeleton(shape.config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert shapes.parameters(model) == PUBLISHED.get(name, shapes.parameters(model))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 7 * shape.layers + 1
    q, k, v, o, gate, up, down = [(linear.in_features, linear.out_features) for linear in linears[:7]]
    packed = {"qkv": (q[0], q[1] + k[1] + v[1]), "o": o, "gate_up": (gate[0], gate[1] + up[1]), "down": down}
    assert shape.products == packed


@pytest.mark.parametrize("name", ["tiny", "untied"])
def test_a_built_model_is_complete(name: str) -> None:
    shape = shapes.SHAPES[name]
    model, again = shapes.build(name), shapes.build(name)
    ordinary = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    assert not model.training
    for path, buffer in ordinary.named_buffers():
        torch.testing.assert_close(model.get_buffer(path), buffer, rtol=0, atol=0)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == shape.tied
    assert dict(model.named_parameters()).keys() == dict(ordinary.named_parameters()).keys()
    for path, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        assert torch.equal(parameter, again.get_parameter(path))
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0 if path.endswith("bias") else 1))
        else:
            assert float(parameter.float().std()) == pytest.approx(shapes.STD, rel=0.1)
            assert len(torch.unique(parameter.float(), dim=0)) == len(parameter)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    cut = shapes.build(name, layers=1)
    assert cut.config.num_hidden_layers == 1 and shapes.parameters(cut) < shapes.parameters(model)
    with pytest.raises(ValueError, match="1 to 2 layers, got 3"):
        shapes.build(name, layers=3)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("graph_2_kernel", SPARSE),
        ("aten::mm", DENSE),
        ("mkldnn::_linear_pointwise", DENSE),
        ("graph_3_gemm_m1n512k2048_kernel", DENSE),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("graph_1_cpp_fused__scaled_dot_product_flash_attention_for_cpu__to_copy_add_where_3", ATTENTION),
        ("graph_1_cpp_fused__to_copy_add_index_copy_le_mul_where_4", ATTENTION),
        ("cpp_fused__unsafe_view_mul_silu_5", GENERATED),
        ("aten::argmax", None),
        ("## Call CompiledFxGraph frtlc7375bxiay ##", None),
    ],
)
def test_groups_of_kernels(name: str, group: str | None) -> None:
    assert decoding.kernel_group(name) == group


def test_a_split_counts_nested_kernels_once() -> None:
    model = shapes.build("tiny")
    split = decoding.time_split(Prompt.read_by(model, decoding.random_ids(model, 8, seed=0)), model, 3)
    assert tuple(split) == GROUPS
    assert split[DENSE] > 0 and split[ATTENTION] > 0 and split[SPARSE] == split[GENERATED] == 0

    def event(name: str, milliseconds: int, *children: Any) -> Any:
        time_range = SimpleNamespace(elapsed_us=lambda: milliseconds * 1e3)
        return SimpleNamespace(name=name, time_range=time_range, cpu_children=children)

    found = dict.fromkeys(GROUPS, 0.0)
    decoding._add_times([event("Region", 90, event("aten::mm", 5, event("aten::mm", 4)), event("kernel", 7))], found)
    assert found == dict.fromkeys(GROUPS, 0.0) | {DENSE: 5, SPARSE: 7}


def test_every_decoding_starts_behind_the_prompt() -> None:
    model, met = shapes.build("tiny"), list[tuple[int, int]]()
    prompt = Prompt.read_by(model, decoding.random_ids(model, 8, seed=0))

    def forward(**inputs: Any) -> Any:
        met.append((int(inputs["input_ids"]), int(inputs["position_ids"])))
        return model(**inputs)

    for _ in range(2):
        assert len(prompt.decode_seconds(forward, 4)) == 4
    assert met[:4] == met[4:] and [position for _, position in met[:4]] == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="room for 128 tokens"):
        prompt.decode_seconds(forward, 129)


def test_freezing_is_set_while_the_first_call_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = torch._inductor.config, list[bool]()
    monkeypatch.setattr(torch, "compile", lambda model, mode: lambda **inputs: seen.append(config.freezing))
    forward = Variant("inductor-max").forward(shapes.build("tiny"), None)
    for frozen in (True, False, False):
        assert forward(input_ids=1) is None and seen.pop() == frozen


def test_bytes_and_records_of_a_model() -> None:
    subject = Subject.prepared("tiny", None, [6, 9], calibrated=True)
    assert [ids.shape for ids in subject.prompts.values()] == [(1, 6), (1, 9)]
    dense = subject.weight_bytes(Variant("eager"))
    assert dense == sum(module.weight.nbytes for module in subject.model.modules() if isinstance(module, nn.Linear))
    assert subject.weight_bytes(Variant("larosa", 0.75)) < subject.weight_bytes(Variant("larosa", 0.5))
    with pytest.raises(ValueError, match="one of eager, inductor"):
        Variant("larosa").forward(subject.model, None)

    (record,) = decode.speeds(subject, 6, {Variant("eager"): dense}, tokens=3, rounds=2)
    assert record.keys() == DECODE_FIELDS and json.loads(json.dumps(record)) == record
    assert 0 < record["spread"][0] <= record["tokens_per_s"] <= record["spread"][1]
    assert record["tokens_per_s"] * record["ms_per_token"] == pytest.approx(1e3)
    assert record["bandwidth_bound_ms"] * record["bandwidth_gb_s"] * 1e6 == pytest.approx(dense)
    assert record["over_bound"] * record["bandwidth_bound_ms"] == pytest.approx(record["ms_per_token"])
    assert record["vs_inductor"] is None and "eager" in shown(decode.table([record]))
    split = record | {"split": dict.fromkeys(GROUPS, 1.5)}
    assert shown(decode.split_table([record, split])).count("1.50") == len(GROUPS)


def test_a_process_of_its_own_reports_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = decode.child(decode.parsed(["--child", "eager", "--shape", "tiny", "--contexts", "6"]))
    made = shapes.build("tiny", 2)
    assert 0 < reported["rss_mb"] <= reported["peak_rss_mb"]
    assert reported["compile_s"] is None and reported["split"] is None
    commands: list[list[str]] = []

    def run(command: list[str], **given: Any) -> Any:
        commands.append(command)
        # the same model, as users have theirs: mapped from a file
        loaded = shapes.build(command[command.index("--shape") + 1])
        assert all(map(torch.equal, made.parameters(), loaded.parameters()))
        assert not next(loaded.parameters()).untyped_storage().resizable()
        failed = "inductor" in command
        return subprocess.CompletedProcess(command, int(failed), "" if failed else json.dumps(reported), "Killed")

    monkeypatch.setattr(subprocess, "run", run)
    record = {"model": "tiny", "layers": 2, "sparsity": 0.0, "guarded": True, "context": 6, "peak_rss_mb": None}
    records = [record | {"variant": "eager"}, record | {"variant": "inductor", "guarded": False}]
    decode.alone(records, None)
    assert [record["peak_rss_mb"] for record in records] == [reported["peak_rss_mb"], None]
    child, other = (decode.parsed(command[3:]) for command in commands)
    assert (child.child, child.layers, child.contexts, child.unguarded) == ("eager", None, [6], False)
    assert (other.child, other.unguarded) == ("inductor", True)


def test_variants_run_without_guards_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = decode.parsed("--unguarded --variants eager inductor larosa --sparsities 0.5".split()).runs
    names = ["eager", "inductor", "inductor, unguarded", "larosa 50%", "larosa 50%, unguarded"]
    assert [str(variant) for variant in runs] == names
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, backend="inductor", options=None: given.append(options))
    subject = Subject.prepared("tiny", None, [6], calibrated=False)
    recipe = Recipe(0.5, {}, {}, {}, {})
    for variant in runs:
        variant.forward(subject.model, recipe)
    assert ["guard_filter_fn" in (options or {}) for options in given] == [False, True, False, True]


def test_fits_over_the_points_of_larosa() -> None:
    """50 GB/s is 20 ms for 10⁹ bytes."""
    given = [("a", 128, size, 3 + 20 * size) for size in (1, 2, 3)] + [("b", 128, 4, 83), ("b", 128, 5, 103)]
    given += [("a", 2048, size, 5 - size) for size in (1, 2, 3)]
    records = [
        {"variant": "larosa", "model": model, "context": context, "bytes_per_token": size * 10**9, "ms_per_token": ms}
        for model, context, size, ms in given
    ]
    records = [record | {"guarded": True} for record in records]
    others: list[dict[str, Any]] = [{"variant": "inductor"}, {"guarded": False}]
    found = decode.fits([*records, *(records[0] | other | {"ms_per_token": 900} for other in others)])
    assert [(fit["fit"], fit["context"], fit["points"]) for fit in found] == [(["a", "b"], 128, 5), (["a"], 128, 3)]
    for fit in found:
        assert (fit["gb_per_s"], fit["intercept_ms"], fit["r2"]) == pytest.approx((50, 3, 1))


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (kernels, ["--shapes", "4x4,-1x3"], "a shape is INxOUT"),
        (kernels, ["--dtypes", "int3"], "invalid choice"),
        (kernels, ["--sparsities", "1"], "a sparsity lies in [0, 1), got '1'"),
        (kernels, ["--rows", "0"], "at least 1, got '0'"),
        (perplexity, ["--windows", "1"], "--windows must be at least 2, for an error to be known, got 1"),
        (perplexity, ["--weights", "int3"], "invalid choice"),
        (perplexity, ["--methods", "wanda"], "invalid choice"),
        (perplexity, ["--protocols", "half"], "invalid choice"),
        (decode, ["--variants", "jax"], "invalid choice"),
        (decode, ["--sparsities", "half"], "a sparsity lies in [0, 1), got 'half'"),
        (decode, ["--tokens", "128"], "--tokens must be below 128"),
        (decode, ["--layers", "3", "--shape", "llama-1b", "tiny"], "tiny can be cut to 1 to 2 layers, got 3"),
        (decode, ["--layers", "3", "--shape", "smollm2"], "only a known shape"),
    ],
)
def test_refused(program: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.parsed(arguments)
    assert message in capsys.readouterr().err


def test_defaults() -> None:
    quick, full = kernels.parsed(["--quick"]), kernels.parsed(["--shapes", "8x4,tiny,8x4"])
    assert quick.shapes == [(4096, 4096), *shapes.SHAPES["llama-1b"].products.values()]
    assert (quick.dtypes, quick.sparsities, quick.rows) == (["bf16"], [0.25, 0.4, 0.5], [1])
    assert full.shapes == [(8, 4), *TINY.products.values()] and full.dtypes == ["bf16", "f16", "f32", "int8", "int4"]
    short, long = decode.parsed(["--quick"]), decode.parsed([])
    assert (short.layers, decode.parsed(["--quick", "--shape", "smollm2"]).layers) == (4, None)
    assert [str(run) for run in short.runs] == ["eager", "inductor", "larosa 50%"]
    assert [run.name for run in long.runs] == ["eager", "inductor", "inductor-max", *["larosa"] * 4]
