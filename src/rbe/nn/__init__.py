"""Layers that hold seeds, and the swap that puts them in place of torch's."""

from rbe.nn.embedding import Embedding
from rbe.nn.linear import Linear
from rbe.nn.seeded import Seeded, SeededVector, set_activations

__all__ = ["Embedding", "Linear", "Seeded", "SeededVector", "set_activations"]
