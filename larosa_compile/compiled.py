"""A rewritten graph handed to Inductor, apart from the folded weights that it will read."""

from dataclasses import dataclass
from typing import Any

from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx_inner
from torch.compiler import config as compiler_config

import larosa_compile.kernels.lowering  # noqa: F401  (registers the lowerings of larosa:: ops)
from larosa_compile.capture import Boxed, Captured, boxed
from larosa_compile.config import Config
from larosa_compile.kernels.digest import source_digest
from larosa_compile.passes.quantised import reads_quantised
from larosa_compile.released import check_not_released
from larosa_compile.weights import FoldedWeights


@dataclass(frozen=True)
class CompiledGraph:
    """used: positions of the captured graph's inputs that are still read. run: takes these, then the folded weights."""

    used: tuple[int, ...]
    run: Boxed

    def with_weights(self, weights: FoldedWeights, config: Config) -> Boxed:
        """The callable in place of the captured graph: drops the inputs it no longer reads, appends the folded ones."""
        used, compiled, folded = self.used, self.run, weights.tensors

        @boxed
        def run(inputs: list[Any]) -> Any:
            weights.check_fresh(inputs)
            if config.recipe_file is not None:
                config.recipe_file.check_unchanged()
            read = [inputs[index] for index in used]
            inputs.clear()
            return compiled([*read, *folded])

        return run


def compile_rewritten(captured: Captured, config: Config) -> CompiledGraph:
    """Compiles a rewritten graph, whose added placeholders stand behind its own; erases those it does not read."""
    graph = captured.graph.graph
    count = len(captured.fakes)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    used = [index for index, node in enumerate(placeholders[:count]) if node.users or node not in captured.tensors]
    for index in sorted(set(range(count)) - set(used), reverse=True):
        graph.erase_node(placeholders[index])
    captured.graph.module.recompile()

    static = set(captured.compile_arguments.get("static_input_idxs", ()))
    arguments = captured.compile_arguments | {
        "static_input_idxs": [
            *(new for new, old in enumerate(used) if old in static),
            *range(len(used), len(used) + len(placeholders) - count),
        ]
    }
    fakes = [captured.fakes[index] for index in used] + [node.meta["val"] for node in placeholders[count:]]
    return CompiledGraph(tuple(used), lower(captured, fakes, arguments, config))


def lower(captured: Captured, fakes: list[Any], arguments: dict[str, Any], config: Config) -> Boxed:
    """A graph as it is, through Inductor, or as `config.lowering` says; operation by operation where it dequantises.

    Raises:
        ReleasedWeightsError: it reads a weight that was released.
    """
    check_not_released(tensor for node, tensor in captured.tensors.items() if node.users)
    module = captured.graph.module
    if config.lowering == "eager" or reads_quantised(captured.graph):
        return boxed(lambda inputs: module(*inputs))
    tracing = TracingContext.try_get()
    if tracing is not None and tracing.output_strides:
        tracing.output_strides.clear()  # of an attempt that was given up
    # Inductor's cache does not see the source of lowerings and templates that others registered
    tag = f"{compiler_config.cache_key_tag}larosa-{source_digest()}"
    with captured.fake_mode, compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Boxed = compile_fx_inner(module, fakes, **arguments)
    return compiled


def lower_dense(captured: Captured, config: Config) -> Boxed:
    """The captured graph, compiled without a change."""
    return lower(captured, captured.fakes, captured.compile_arguments, config)
