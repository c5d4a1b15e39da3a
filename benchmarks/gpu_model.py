"""What a decoder layer costs on a GPU, as a formula: no GPU was timed for any of it.

    time = bytes that move / (bandwidth · share) + launches · launch + Σ thresholds

The formula is symbolic (sympy); every assumption is a field with its reason, and is printed with the results. Bytes
are those of weights: activations and partial sums, less than 1 MB a layer, are left out.
"""

import dataclasses
from dataclasses import dataclass

import sympy

from benchmarks.shapes import SHAPES, Shape
from larosa_compile.allocation import fewest_sharing

GPU_SHAPES = {name: SHAPES[name] for name in ("llama-7b", "llama-8b")} | {
    "llama-70b": Shape("llama", 8192, 28672, 80, 64, 8, 128256, False)
}


@dataclass(frozen=True)
class Device:
    """Bandwidth in 10⁹ bytes per second and clock in MHz, from the maker's data sheet."""

    name: str
    gb_per_s: float
    mhz: float


DEVICES = {
    "sm_80": Device("A100 80GB SXM", 2039, 1410),
    "sm_90": Device("H100 SXM", 3350, 1755),
    "sm_100": Device("B200", 8000, 1965),
    "gfx942": Device("MI300X", 5300, 2100),
}


@dataclass(frozen=True)
class Assumptions:
    """What no machine here could measure. Counts of cycles are of one block that works through a row."""

    share: float = 0.85
    """Of the data sheet's bandwidth that a product of one row reaches, dense or sparse."""

    launch_us: float = 1.5
    """From the end of a kernel to the work of the next inside a CUDA graph, per kernel."""

    cycles_per_pass: float = 250
    """A pass over the row: the block's reduction and its barriers."""

    cycles_per_step: float = 60
    """One step of a pass: loading, from the first-level cache, and counting 2048 entries."""

    passes: int = 8
    """Two bits of fifteen a pass; counted in the source of the threshold."""

    def lines(self) -> list[str]:
        return [f"{field.name} = {getattr(self, field.name)}" for field in dataclasses.fields(self)]


STEP = 2048
"""Entries that a block takes at a time; Inductor's choice for rows longer than 1024."""

PUBLISHED = (
    "LaRoSA (arXiv 2507.01299), LLaMA2-7B, A100, batch 1: 1.14x at 25 %, 1.30x at 40 %, 1.38x at 50 %, 1.72x at 75 %",
    "TEAL (arXiv 2408.14690), Llama-2, Llama-3 and Mistral, batch 1: up to 1.53x to 1.8x at 40 to 50 %",
)

moved, bandwidth, launches, launch, selection = sympy.symbols(
    "bytes bandwidth launches launch thresholds", positive=True
)
TIME = moved / bandwidth + launches * launch + selection
"""Microseconds of a layer beyond attention."""


@dataclass(frozen=True)
class Terms:
    """The terms of one layer at one sparsity, in bytes and microseconds."""

    bytes: int
    reading_us: float
    launch_us: float
    threshold_us: float

    @property
    def total_us(self) -> float:
        value = TIME.subs(
            {moved: self.reading_us, bandwidth: 1, launches: self.launch_us, launch: 1, selection: self.threshold_us}
        )
        return float(value)


def weight_bytes(shape: Shape, skipped: float, adapters: float = 0, itemsize: int = 2) -> int:
    """Bytes of weight that a layer reads when every product skips this share of its rows; adapters skip none.

    adapters: per layer, a fraction where layers share a basis.
    """
    products = sum(rows * columns for rows, columns in shape.products.values())
    return round(products * (1 - skipped) + shape.hidden**2 * adapters) * itemsize


def adapters_per_layer(shape: Shape, skipped: float, rotation: str) -> float:
    """For rotation "layer", "model", or "auto", by the rule that calibration has."""
    if rotation == "auto":
        return 1 / fewest_sharing(2 * shape.hidden**2, weight_bytes(shape, skipped))
    return {"layer": 1.0, "model": 0.0}[rotation]


def threshold_us(features: int, device: Device, assumed: Assumptions) -> float:
    """A threshold of one row of so many features, by one block, beyond making the row."""
    steps = -(-features // STEP)
    return assumed.passes * (assumed.cycles_per_pass + steps * assumed.cycles_per_step) / device.mhz


def layer_terms(
    shape: Shape, device: Device, assumed: Assumptions, launches_per_layer: float, skipped: float, adapters: float = 0
) -> Terms:
    """A sparse layer; at `skipped` 0 the same kernels with nothing dropped."""
    read = weight_bytes(shape, skipped, adapters)
    selected = sum(threshold_us(rows, device, assumed) for rows, _ in shape.products.values()) if skipped else 0.0
    return Terms(read, _reading_us(read, device, assumed), launches_per_layer * assumed.launch_us, selected)


DENSE_LAUNCHES = 7
"""The fewest a dense layer takes: norm, q/k/v, o with the residual, norm, gate and up, their product, down."""


def dense_terms(shape: Shape, device: Device, assumed: Assumptions) -> Terms:
    """A dense bfloat16 layer with packed weights: the floor."""
    read = weight_bytes(shape, 0.0)
    return Terms(read, _reading_us(read, device, assumed), DENSE_LAUNCHES * assumed.launch_us, 0.0)


def break_even_share(sparse: Terms, dense: Terms, wanted: float, assumed: Assumptions) -> float | None:
    """Share of bandwidth with which a sparse layer is still `wanted` times as fast as the dense one with its own.

    None where no bandwidth suffices: launches and thresholds alone take too long.
    """
    share = sympy.Symbol("share", positive=True)
    time = TIME.subs({moved: sparse.reading_us * assumed.share, bandwidth: share, launches: sparse.launch_us})
    time = time.subs({launch: 1, selection: sparse.threshold_us})
    found = sympy.solve(sympy.Eq(dense.total_us, wanted * time), share)
    return float(found[0]) if found else None


def _reading_us(read: int, device: Device, assumed: Assumptions) -> float:
    return read / (device.gb_per_s * 1e3 * assumed.share)
