"""What scores, distributions and types are told of the weights of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A share to keep: of all weights together, or of each by itself.
Shares = float | dict[str, float]
# The same as numbers of entries.
Counts = int | dict[str, int]


class Weight(NamedTuple):
    """A weight at the moment of pruning, or anything that is ranked like one.

    Attributes:
        stored: what the layer's Parameter holds, with its ``.grad``; or scores of its shape.
        alpha: α where ``stored`` is φ; None where it is θ, or scores.
    """

    stored: Tensor
    alpha: Tensor | None = None


class Size(NamedTuple):
    """How much there is to share out of a weight.

    Attributes:
        shape: of the weight.
        entries: how many of its entries the pruner has pruned or may prune: all but those that an
            ``update_mask`` of the user's freezes or that ``mask`` hides from the network.
    """

    shape: torch.Size
    entries: int
