"""One decode step of a transformers model through the passes, as a program for a GPU that is not there."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache

from larosa_compile import compiled as compiling
from larosa_compile.caches import CACHE
from larosa_compile.capture import Boxed, Captured, boxed, capture
from larosa_compile.config import Config
from larosa_compile.passes.pipeline import Rewritten, pack, rewrite
from larosa_compile.passes.plan import SiteChoice
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE
from tests.support.decoder import Choice
from tests.support.gpu_programs import Program, generate


class DecodeStep(nn.Module):
    """Logits of one token at `position` behind `position` others, with the cache that holds these."""

    def __init__(self, model: Any, length: int = 16, position: int = 5) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        reference = next(model.parameters())
        self.cache = StaticCache(config=self.config, max_cache_len=length)
        self.cache.early_initialization(
            1, self.config.num_key_value_heads, self.config.head_dim, reference.dtype, reference.device
        )
        for layer in self.cache.layers:
            layer.cumulative_length = torch.full_like(layer.cumulative_length, position)
        self.inputs = [torch.tensor([[7]]), torch.tensor([[position]])]

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        found = self.model(input_ids=ids, position_ids=position, **{CACHE: self.cache}, use_cache=True)
        logits: Tensor = found.logits
        return logits

    @property
    def state(self) -> list[Tensor]:
        """Everything a graph of this step may take as an input, in an order that copies share."""
        caches = [x for layer in self.cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        return [*self.model.parameters(), *self.model.buffers(), *caches, *self.inputs]

    def on_a_fake_gpu(self, mode: FakeTensorMode) -> "DecodeStep":
        """The same step, all of whose tensors are fakes on "cuda"."""
        memo: dict[int, Any] = {}
        with mode:
            for tensor in self.state:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        step = copy.deepcopy(self, memo)
        for layer in step.cache.layers:
            layer.device = torch.device("cuda", 0)
        return step


@dataclass
class Generated:
    """A program for a decode step, and what decided it.

    inputs: name of a graph's input -> which of the step's `state` it is, for inputs that the passes did not add.
    static: names of the inputs that keep their address from call to call. weights: the format of the sites' weights.
    """

    program: Program
    rewritten: Rewritten
    inputs: dict[str, int]
    static: set[str]
    choose: "Choose"
    weights: str = OWN_DTYPE

    def arguments(self, step: DecodeStep, rotations: Mapping[str, Tensor]) -> list[Tensor]:
        """The wrapper's arguments for the real step: copies of its state, and the weights folded on the CPU."""
        captured, rewritten = rewritten_on_the_cpu(step, self.choose, self.weights)
        parameters = {captured.graph.paths[node]: tensor for node, tensor in captured.tensors.items()}
        with torch.no_grad():
            made = {spec.key: spec.build(parameters, rotations) for spec in rewritten.folded.values()}
        folded = {node.name: made[spec.key] for node, spec in self.rewritten.folded.items()}
        state = step.state
        return [
            folded[name] if name in folded else state[self.inputs[name]].detach().clone() for name in self.program.names
        ]


Choose = Callable[[Captured], tuple[Captured, Mapping[str, SiteChoice]]]
"""What to make sparse in a captured graph, and the graph with its parameters named as the choices name them."""


def by_recipe(recipe: Recipe) -> Choose:
    """As the backend chooses."""
    return lambda captured: (captured.renamed(recipe.locate(captured.shapes)), recipe.sites)


def every_site(sparsity: float = 0.5, rotated: str | None = "layer") -> Choose:
    """Every linear of every layer; what reads the stream in the basis of its layer ("layer"), of the model, or none."""

    def choose(captured: Captured) -> tuple[Captured, Mapping[str, SiteChoice]]:
        found = {}
        for path in captured.shapes:
            inside = re.search(r"\.layers\.(\d+)\..*\b(?:([qkv]|gate|up)|o|down)_proj\.weight$", path)
            if inside:
                basis = {"layer": f"l{inside[1]}", "model": "l", None: None}[rotated]
                found[path] = Choice(sparsity, basis if inside[2] else None)
        return captured, found

    return choose


def _rewritten(captured: Captured, choices: Mapping[str, SiteChoice], weights: str) -> Rewritten:
    """As the backend rewrites a graph, in place."""
    packs = weights != OWN_DTYPE
    made = rewrite(captured.graph, choices, captured.fake_mode, share_tables=not packs)
    return pack(captured.graph, made, weights, captured.fake_mode) if packs else made


def rewritten_on_the_cpu(step: DecodeStep, choose: Choose, weights: str) -> tuple[Captured, Rewritten]:
    """The graph of the real step after the passes."""
    found: list[tuple[Captured, Rewritten]] = []

    def keep(captured: Captured) -> Boxed:
        captured, choices = choose(captured)
        found.append((captured, _rewritten(captured, choices, weights)))
        return boxed(lambda values: captured.graph.module(*values))

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=lambda graph, given: _caught(graph, given, keep))
    with torch.no_grad():
        try:
            compiled(*step.inputs)
        except _KeptError:
            pass
    (only,) = found
    return only


class _KeptError(Exception):
    """Ends a compilation whose graph is kept."""


def _caught(graph: torch.fx.GraphModule, given: list[Any], keep: Any) -> Any:
    capture(graph, given, keep)

    def stop(*values: Any) -> Any:
        raise _KeptError

    return stop


def decode_program(
    step: DecodeStep, choose: Choose, target: str = "sm_90", mode: str | None = None, weights: str = OWN_DTYPE
) -> Generated:
    """What the backend generates for `step`; weights may be on the meta device, nothing of them is read.

    mode: of torch.compile, e.g. "reduce-overhead". weights: the format of the sites' weights.
    """
    fake = step.on_a_fake_gpu(FakeTensorMode())
    numbers = {id(tensor): number for number, tensor in enumerate(fake.state)}
    made: list[tuple[Rewritten, dict[str, int], set[str]]] = []

    def compile_graph(captured: Captured) -> Boxed:
        placeholders = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
        inputs = {node.name: numbers[id(value)] for node, value in zip(placeholders, captured.inputs, strict=True)}
        captured, choices = choose(captured)
        rewritten = _rewritten(captured, choices, weights)
        static: set[str] = set()

        def keep_static(module: torch.fx.GraphModule, fakes: list[Any], **arguments: Any) -> Any:
            names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
            static.update(names[index] for index in arguments["static_input_idxs"])
            return original(module, fakes, **arguments)

        original = compiling.compile_fx_inner
        no_weights: Any = SimpleNamespace(tensors=[], check_fresh=lambda inputs: None)
        with torch.no_grad():
            compiling.compile_fx_inner = keep_static
            try:
                compiled = compiling.compile_rewritten(captured, Config()).with_weights(no_weights, Config())
            finally:
                compiling.compile_fx_inner = original
        made.append((rewritten, inputs, static))
        return compiled

    options = torch._inductor.list_mode_options(mode) if mode else {}
    program = generate(
        fake,
        fake.inputs,
        target,
        backend=lambda graph, given: capture(graph, given, compile_graph, options),
    )
    ((rewritten, inputs, static),) = made
    return Generated(program, rewritten, inputs, static, choose, weights)
