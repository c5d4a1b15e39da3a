"""Held-out text cut into pieces: some to measure on, others to check what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from larosa_compile.errors import OptionError

PIECE = 512
"""Tokens of a piece: more places of the text for the same work, and less memory."""

CHECK_TOKENS = 4096
"""What a choice is kept or dropped by. Their dense logits stay in memory."""


@dataclass(frozen=True)
class HeldOut:
    """Token ids [batch, tokens] of one length. checked: of every third piece, the first `CHECK_TOKENS`."""

    measured: tuple[Tensor, ...]
    checked: tuple[Tensor, ...]

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> "HeldOut":
        """Cuts token ids [batch, tokens] into pieces.

        Raises:
            OptionError: there are fewer than two.
        """
        pieces = [
            piece for ids in batches for piece in ids.split(PIECE, -1) if piece.shape[-1] == min(PIECE, ids.shape[-1])
        ]
        if len(pieces) < 2:
            raise OptionError(
                f"allocate='search' needs at least two pieces of {PIECE} tokens of held-out text, or two batches, to "
                f"measure on one and check on another, got {len(pieces)}; pass more text as search=…"
            )
        measured = [piece for index, piece in enumerate(pieces) if index % 3 != 1]
        return cls(tuple(measured), first(pieces[1::3], CHECK_TOKENS))


def first(batches: Sequence[Tensor], tokens: int) -> tuple[Tensor, ...]:
    """As many batches as hold so many tokens, and one at least."""
    count, taken = 0, list[Tensor]()
    for batch in batches:
        if taken and count + batch.numel() > tokens:
            break
        taken.append(batch)
        count += batch.numel()
    return tuple(taken)
