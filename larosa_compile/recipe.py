"""Recipe: what calibration measured on one model, independent of any graph or device.

A recipe says which linears drop how much of their input and in which orthonormal basis. It is a value: the
methods return new recipes. The layout of the file is in `recipe_file.py`.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from larosa_compile import recipe_file, registry
from larosa_compile.errors import RecipeError
from larosa_compile.fingerprint import locate
from larosa_compile.memory import return_mapped
from larosa_compile.passes.selection import TOP_K
from larosa_compile.recipe_checks import (
    LAROSA,
    OWN_DTYPE,
    check_method,
    check_weights,
    checked_rotation,
    checked_sparsity,
    checked_spectrum,
)
from larosa_compile.site import MAX_SPARSITY, UNMEASURED, SiteRecipe

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None
"""What the provenance of a recipe may be made of."""


@dataclass(frozen=True, eq=False, repr=False)
class Recipe:
    """Sparsity and basis of every site of one model.

    Attributes:
        sparsity: the nominal sparsity the sites were derived from, in [0, 1).
        sites: by the parameter path of the linear's weight, e.g. "model.layers.0.self_attn.q_proj.weight".
        rotations: by basis key, Q `[d, d]` float32 with eigenvectors as columns, eigenvalues descending.
            Rows rotate as `x @ Q`. Kept on the CPU, contiguous.
        parameters: parameter path -> shape of the calibrated model, its fingerprint.
        calibration: provenance (tokens, digest of the text, versions, ...), anything JSON can hold.
        spectra: by basis key, each column's share of the energy `Σ x²` of what was calibrated on, `[d]` float32.
            Nothing computes with them; recipes of older files have none.
        weights: in which format compiled graphs read the sites' weights: "model", the model's own dtype, or a name in
            `kernels.formats.FORMATS`.
        method: what the sites were derived by: "larosa", "teal", "cats", or "dense", which has none.

    Raises:
        RecipeError: a number is not finite or out of range, a Q is not square, float32 and orthogonal, a
            spectrum does not fit its Q, a site names a basis that is missing or that does not fit the site's weight.
    """

    sparsity: float
    sites: Mapping[str, SiteRecipe]
    rotations: Mapping[str, Tensor]
    parameters: Mapping[str, tuple[int, ...]]
    calibration: Mapping[str, JSON]
    spectra: Mapping[str, Tensor] = field(default_factory=dict)
    weights: str = OWN_DTYPE
    method: str = LAROSA

    def __post_init__(self) -> None:
        rotations = {key: checked_rotation(key, q) for key, q in self.rotations.items()}
        parameters = {path: tuple(int(size) for size in shape) for path, shape in self.parameters.items()}
        try:
            # Through JSON and back, so that a loaded recipe holds exactly what the saved one held.
            calibration = json.loads(json.dumps(self.calibration, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise RecipeError(f"calibration must hold finite JSON values only: {error}") from error
        _check_sites(self.sites, rotations, parameters)
        spectra = {key: checked_spectrum(key, spectrum, rotations) for key, spectrum in self.spectra.items()}
        check_weights(self.weights)
        check_method(self.method)
        object.__setattr__(self, "sparsity", checked_sparsity(self.sparsity))
        object.__setattr__(self, "sites", dict(self.sites))
        object.__setattr__(self, "rotations", rotations)
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "calibration", calibration)
        object.__setattr__(self, "spectra", spectra)

    def with_sparsity(self, sparsity: float) -> "Recipe":
        """Return the recipe at another nominal sparsity; each site gets `min(coefficient * sparsity, 0.99)`.

        Raises:
            RecipeError: `sparsity` is not in [0, 1).
        """
        nominal = checked_sparsity(sparsity)
        sites = {
            path: replace(site, sparsity=min(site.coefficient * nominal, MAX_SPARSITY))
            for path, site in self.sites.items()
        }
        return self._changed(sparsity=nominal, sites=sites)

    def with_coefficients(self, coefficients: Mapping[str, float]) -> "Recipe":
        """Return the recipe with other coefficients by kind, at the same nominal sparsity.

        Raises:
            RecipeError: a coefficient is negative or not finite.
        """
        sites = {
            path: replace(site, coefficient=coefficients.get(site.kind, site.coefficient))
            for path, site in self.sites.items()
        }
        return self.with_sites(sites).with_sparsity(self.sparsity)

    def with_sites(self, sites: Mapping[str, SiteRecipe], provenance: Mapping[str, JSON] | None = None) -> "Recipe":
        """Return the recipe with other choices for its sites, in the bases that it has.

        `provenance`, where they come from, is added to its.

        Raises:
            RecipeError: a site names a basis that is missing or that does not fit its weight.
        """
        _check_sites(sites, self.rotations, self.parameters)
        return self._changed(sites=dict(sites), calibration={**self.calibration, **(provenance or {})})

    def with_selection(self, selection: str) -> "Recipe":
        """Return the recipe with every site choosing by another rule; thresholds then keep everything until measured.

        Raises:
            RecipeError: there is no such rule.
        """
        quantiles = None if selection == TOP_K else UNMEASURED
        sites = {path: replace(site, selection=selection, quantiles=quantiles) for path, site in self.sites.items()}
        return self._changed(sites=sites)

    def with_weights(self, weights: str) -> "Recipe":
        """Return the recipe for weights in another format: "int8", "int4", or "model" for the model's own dtype.

        Raises:
            RecipeError: there is no such format.
        """
        check_weights(weights)
        return self._changed(weights=weights)

    @property
    def packs(self) -> bool:
        """Whether compiled graphs read the sites' weights in fewer bits."""
        return self.weights != OWN_DTYPE

    def without_rotation(self) -> "Recipe":
        """Return the recipe with every site in its own basis: plain magnitude sparsity, the baseline.

        Raises:
            RecipeError: a site chooses by a threshold that was measured in a rotated basis.
        """
        bound = next((path for path, site in self.sites.items() if site.basis and site.quantiles), None)
        if bound is not None:
            raise RecipeError(
                f"the thresholds of {bound!r} were measured in its rotated basis, and only top-k may change the basis; "
                "call calibrate(…, method='teal'), or with rotation='none'"
            )
        sites = {path: replace(site, basis=None) for path, site in self.sites.items()}
        return self._changed(sites=sites, rotations={}, spectra={})

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over everything the recipe holds, independent of the order of its mappings."""
        canonical = json.dumps(self.header(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        sha = hashlib.sha256(canonical.encode())
        sha.update(self.rotations_digest.encode())
        for key in sorted(self.spectra):
            sha.update(f"\n{key}\n".encode())
            sha.update(self.spectra[key].numpy().data)
        return sha.hexdigest()

    @cached_property
    def rotations_digest(self) -> str:
        """Hex SHA-256 over the rotations alone: what folded weights depend on, at any sparsity."""
        sha = hashlib.sha256()
        for key in sorted(self.rotations):
            sha.update(f"\n{key} {tuple(self.rotations[key].shape)}\n".encode())
            sha.update(self.rotations[key].numpy().data)
        return sha.hexdigest()

    def header(self) -> dict[str, JSON]:
        """Return everything but the tensors, as JSON values, without what has the value it has by default."""
        header: dict[str, JSON] = {
            "sparsity": self.sparsity,
            "sites": {path: site.header() for path, site in self.sites.items()},
            "parameters": {path: list(shape) for path, shape in self.parameters.items()},
            "calibration": self.calibration,
        }
        # so that the digest of a recipe in an older file is still what that file says
        named = {"weights": (self.weights, OWN_DTYPE), "method": (self.method, LAROSA)}
        return header | {name: value for name, (value, default) in named.items() if value != default}

    def locate(self, found: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Find the parameters of a graph (path -> shape) in the calibrated model: path there -> path here.

        Raises:
            RecipeMismatchError: they are not the model's, or a part that fits several places of it.
        """
        return locate(self.parameters, found)

    def attach(self, model: nn.Module) -> None:
        """Make this the recipe of `model`: of a bare `torch.compile(model, backend="larosa")`, and of its parts.

        Raises:
            RecipeMismatchError: the model is not the one this recipe was measured on.
        """
        self.locate({path: tuple(parameter.shape) for path, parameter in model.named_parameters()})
        registry.remember_recipe(model, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to one safetensors file, atomically; an existing file is replaced.

        Raises:
            RecipeError: the folder does not exist.
        """
        recipe_file.write(Path(path), self.header(), self.rotations, self.spectra, self.digest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe that `save` wrote.

        Raises:
            RecipeError: the file is missing, damaged, of another schema, or not a recipe.
        """
        source = Path(path)
        header, rotations, spectra, digest = recipe_file.read(source)
        try:
            recipe = _from_header(header, rotations, spectra)
        except RecipeError as error:
            raise RecipeError(f"{source} holds an invalid recipe: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise recipe_file.damaged(source, f"its header cannot be read ({error!r})") from error
        if recipe.digest != digest:
            raise recipe_file.damaged(source, f"its contents have digest {recipe.digest[:12]}, it says {digest[:12]!r}")
        return_mapped(rotations.values())  # all of it was read, to be checked
        return recipe

    def __repr__(self) -> str:
        return (
            f"Recipe(sparsity={self.sparsity:g}, sites={len(self.sites)}, bases={len(self.rotations)}, "
            f"digest={self.digest[:12]})"
        )

    def _changed(self, **fields: object) -> "Recipe":
        # Not dataclasses.replace: its __init__ would prove every rotation orthogonal again, O(d³) each.
        twin = copy.copy(self)
        twin.__dict__.pop("digest", None)
        if "rotations" in fields:
            twin.__dict__.pop("rotations_digest", None)
        twin.__dict__.update(fields)
        return twin


def _from_header(header: Mapping[str, Any], rotations: Mapping[str, Tensor], spectra: Mapping[str, Tensor]) -> Recipe:
    sites = {path: SiteRecipe(**site) for path, site in header["sites"].items()}
    return Recipe(**{**header, "sites": sites, "rotations": rotations, "spectra": spectra})


def _check_sites(
    sites: Mapping[str, SiteRecipe],
    rotations: Mapping[str, Tensor],
    parameters: Mapping[str, tuple[int, ...]],
) -> None:
    for path, site in sites.items():
        if site.basis is None:
            continue
        if site.basis not in rotations:
            raise RecipeError(f"site {path!r} names the basis {site.basis!r}, which has no rotation")
        # A linear keeps its weight as [out, in] or as [in, out]; the recipe does not say which.
        size, shape = len(rotations[site.basis]), parameters.get(path)
        if shape is not None and size not in shape:
            raise RecipeError(
                f"site {path!r} has a weight of shape {list(shape)}, "
                f"which does not fit the {size} features of basis {site.basis!r}"
            )
