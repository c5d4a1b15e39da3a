"""Parameters that arrive quantised, as subclasses of Tensor (torchao's, for instance): read as what they stand for.

A graph is captured with plain stand-ins for them, and takes their values by `dequantised`, a step like any other of a
parameter expression. So folding meets one weight at a time in full precision, whatever its class stores.
"""

from functools import partial

from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from larosa_compile.passes.algebra import Rotations
from larosa_compile.passes.graph import ParameterGraph, is_call, value
from larosa_compile.passes.parameters import Parameters
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor


def is_quantised(tensor: object) -> bool:
    """Whether a tensor keeps its values in other tensors, which its class knows how to read."""
    return isinstance(tensor, Tensor) and is_traceable_wrapper_subclass(tensor)


def dequantised(tensor: Tensor) -> Tensor:
    """The plain tensor that a quantised one stands for, in the dtype that it claims; a plain one as it is."""
    if not is_quantised(tensor):
        return tensor
    plain: Tensor = tensor.dequantize()
    return plain.detach().to(tensor.dtype)


def stored_in(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values: itself, unless it is quantised."""
    if not is_quantised(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [plain for name in names for plain in stored_in(getattr(tensor, name))]


def take_values(graph: ParameterGraph, quantised: list[Node]) -> None:
    """Puts `dequantised` behind placeholders, whose fake values are those of their stand-ins already."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in quantised:
        with graph.graph.inserting_before(placeholders[-1].next):
            plain = graph.graph.create_node("call_function", dequantised, (node,), name=f"{node.name}_dequantised")
        plain.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(plain, delete_user_cb=lambda user, plain=plain: user is not plain)  # type: ignore[misc]
    graph.module.recompile()


def reads_quantised(graph: ParameterGraph) -> bool:
    """Whether something in a graph still takes the values of a quantised parameter."""
    return any(is_call(node, dequantised) for node in graph.graph.nodes)


def store_values(editor: GraphEditor) -> None:
    """Makes what still reads quantised parameters, and was not folded, read plain copies of them."""
    for node in list(editor.graph.nodes):
        if is_call(node, dequantised):
            (placeholder,) = node.all_input_nodes
            path, fake = editor.source.paths[placeholder], value(node)
            assert fake is not None
            build = partial(_plain, path)
            stored = FoldedTensor(f"values {path}", (path,), tuple(fake.shape), fake.dtype, fake.device, build)
            node.replace_all_uses_with(editor.folded_input(f"values {path}", stored))
            editor.graph.erase_node(node)


def _plain(path: str, parameters: Parameters, rotations: Rotations) -> Tensor:
    return dequantised(parameters[path].detach()).contiguous()
