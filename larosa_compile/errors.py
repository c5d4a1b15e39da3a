"""Errors that a user of larosa_compile can meet, under one base class."""


class LarosaError(Exception):
    """Base of every error that larosa_compile raises on purpose."""


class OptionError(LarosaError, ValueError):
    """An option of the backend is unknown, or its value is of the wrong type or out of range."""


class RecipeError(LarosaError, ValueError):
    """A recipe, or the file that should hold one, is not valid."""


class RecipeMismatchError(RecipeError):
    """The recipe was measured on a model with other parameters than the one being compiled."""


class MissingRecipeError(LarosaError, LookupError):
    """A recipe is needed here and none was given."""


class StaleWeightsError(LarosaError, RuntimeError):
    """The model's weights changed after their folded copies were made."""


class ReleasedWeightsError(LarosaError, RuntimeError):
    """A weight was used whose memory was released after it was folded."""


class StaleRecipeError(LarosaError, RuntimeError):
    """The recipe's file changed after a model was compiled with it."""


class InferenceOnlyError(LarosaError, RuntimeError):
    """A gradient was asked for; sparsified graphs are for inference only."""


class MissingPackageError(LarosaError, ImportError):
    """An optional package is needed here and not installed."""


class ModelError(LarosaError, RuntimeError):
    """A model or its tokenizer cannot be loaded, or cannot do what was asked of it."""


class MissingModelError(ModelError, FileNotFoundError):
    """There is no file or folder of this name to load a model from."""
