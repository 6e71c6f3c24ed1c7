"""qat: quantization-aware training that ends in a verified packed model."""

__version__ = "0.1.0"
