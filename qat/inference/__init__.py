"""Run exported models: packed layers, loading, generation."""

from qat.inference.generate import stream
from qat.inference.load import load_packed
from qat.inference.packed import PackedLinear

__all__ = ["PackedLinear", "load_packed", "stream"]
