"""Work beside other work: in a thread while a block runs, on one of torch's threads less, and no error is lost."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext

import larosa_compile
from larosa_compile import attempt
from larosa_compile.beside import beside
from larosa_compile.recipe import Recipe
from larosa_compile.weights import FoldedWeights
from tests.support.models import tiny_model, token_ids


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many of torch's threads, on however many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Steps:
    """Counts down, and remembers which threads did, and on how many of torch's."""

    def __init__(self, count: int) -> None:
        self.left, self.by, self.threads = count, list[str](), list[int]()
        self.done = threading.Event()

    def __call__(self) -> bool:
        if not self.left:
            self.done.set()
            return False
        self.left -= 1
        self.by.append(threading.current_thread().name)
        self.threads.append(torch.get_num_threads())
        return True


def test_steps_are_done_while_the_block_runs_on_the_other_threads(threads: int) -> None:
    steps = Steps(5)
    with beside(steps):
        assert steps.done.wait(60)
        assert torch.get_num_threads() == threads
    assert steps.by == ["larosa-beside"] * 5 and steps.threads == [threads - 1] * 5
    begun = list[int]()
    later = threading.Thread(target=lambda: begun.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == threads == begun[0]


def test_what_is_left_is_the_caller_s(threads: int) -> None:
    asked, ended = threading.Event(), threading.Event()

    def step() -> bool:
        asked.set()
        ended.wait(60)
        return True  # for ever

    with beside(step):
        assert asked.wait(60)
        threading.Timer(0.05, ended.set).start()
    assert "larosa-beside" not in {thread.name for thread in threading.enumerate()}


def test_one_thread_is_the_block_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    steps = Steps(3)
    with beside(steps):
        pass
    assert steps.left == 3


def test_an_error_of_a_step_is_raised_after_the_block_and_one_of_the_block_at_once(threads: int) -> None:
    reached = threading.Event()

    def fail() -> bool:
        reached.set()
        raise ValueError("in a step")

    with pytest.raises(ValueError, match="in a step"), beside(fail):
        assert reached.wait(60)
    steps = Steps(1)
    with pytest.raises(KeyError), beside(steps):
        raise KeyError
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return larosa_compile.calibrate(tiny_model("llama"), [token_ids(4, 16)], 0.5)


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("release", [False, True])
def test_what_is_folded_while_a_model_is_compiled_is_what_it_runs_on(
    recipe: Recipe, weights: str, release: bool, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(**options: Any) -> torch.Tensor:
        torch._dynamo.reset()
        compiled: Any = torch.compile(
            tiny_model("llama"), backend="larosa", options={"recipe": recipe, "weights": weights} | options
        )
        return compiled(input_ids=token_ids(1, 8), use_cache=False).logits

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing goes on beside then
    expected = logits()
    by = list[str]()
    fold_one = FoldedWeights.fold_one

    def watched(self: FoldedWeights) -> bool:
        by.append(threading.current_thread().name)
        return fold_one(self)

    monkeypatch.setattr(FoldedWeights, "fold_one", watched)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(logits(release_originals=release), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
    # the first is folded while Inductor is at work, which takes seconds
    assert by[0] == "larosa-beside"
    assert by[-1] == threading.current_thread().name


@pytest.mark.parametrize("weights", ["model", "int8"])
def test_folding_asks_no_fake_tensor_for_its_device(
    recipe: Recipe, weights: str, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is 'meta' for as long as another thread computes with fake tensors."""

    @contextmanager
    def while_fakes_are_computed_with(step: Any) -> Iterator[None]:
        fake_mode: Any = TracingContext.get().fake_mode
        fake_mode.in_kernel_invocation = True
        try:
            assert fake_mode.from_tensor(torch.empty(1)).device.type == "meta"
            while step():
                pass
        finally:
            fake_mode.in_kernel_invocation = False
        yield

    monkeypatch.setattr(attempt, "beside", while_fakes_are_computed_with)
    options: Any = {"recipe": recipe, "weights": weights, "release_originals": True}
    model = torch.compile(tiny_model("llama"), backend="larosa", options=options)
    assert model(input_ids=token_ids(1, 8), use_cache=False).logits.isfinite().all()


class _AtWorkError(Exception):
    """Raised in the place of compiling."""


@pytest.mark.parametrize("tuned", [None, "max_autotune", "max_autotune_gemm"])
def test_nothing_goes_on_where_kernels_are_timed(
    recipe: Recipe, tuned: str | None, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    @contextmanager
    def watched(step: Any) -> Iterator[None]:
        asked.append(True)
        yield

    def stop(*arguments: Any) -> Any:
        raise _AtWorkError

    monkeypatch.setattr(attempt, "beside", watched)
    monkeypatch.setattr(attempt, "compile_rewritten", stop)
    compiled: Any = torch.compile(tiny_model("llama"), backend="larosa", options={"recipe": recipe})
    settings = {tuned: True} if tuned else {}
    with torch.no_grad(), inductor_config.patch(settings), pytest.raises(BackendCompilerFailed, match="_AtWorkError"):
        compiled(input_ids=token_ids(1, 8), use_cache=False)
    assert bool(asked) == (tuned is None)
