"""Which CUDA kernel computes a packed linear layer, on what grid: pure functions of shapes and types.

    tokens      kernel
    1 to 8      linear_small    warps share k inside of a block
    9 to 64     linear_medium   blocks share k where there are too few rows to fill the device
    more        linear_medium   INT8 activations: 64 tokens a block
                dequantize      others: into a dense workspace, then torch's matrix multiplication

The constants are those of `csrc/cuda/*.cuh`; a test compares them.  The choices are estimates: no kernel has
been timed on a GPU yet.
"""

from dataclasses import dataclass

import torch

TILE_N, TILE_K = 16, 64
SMALL_TOKENS, SMALL_THREADS = 8, 256
MEDIUM_TOKENS, MEDIUM_THREADS, MEDIUM_ROW_TILES, MEDIUM_STAGES = 64, 128, 8, 4
DEQUANTIZE_WARPS, REPACK_THREADS, SUM_THREADS = 8, 256, 256
QUANTIZE_THREADS = 256
# A split of linear_medium shorter than this spends its time filling the pipeline.
MIN_TILES_OF_SPLIT = 2 * MEDIUM_STAGES

# A row of x, and of a dequantized weight, is padded to whole 16-byte loads: 8 values of a 16-bit type, 16 of INT8.
ROW_MULTIPLE, INT8_ROW_MULTIPLE = 8, 16
# quantize.cuh keeps a row in shared memory, of which every device since sm_80 has 96 KiB for a block.  (Sums of INT8
# products fit an int32 far beyond: k * 2^14 < 2^31.)
MAX_INT8_INPUTS = 96 * 1024 // 2

TYPE_NAMES = {torch.float16: "qat::f16", torch.bfloat16: "qat::bf16", torch.float32: "float"}


@dataclass(frozen=True)
class Layer:
    """A packed layer as the kernels see it.

    Attributes:
        n, k: outputs and inputs.
        bits: of a weight, 4 or 8.
        group_size: 32, a multiple of 64, or k.
        dtype: of activations, float16 or bfloat16.
        scale_dtype: of scales at run time, `dtype` or float32.
        int8_input: activations are multiplied as integers; `dtype` is then the result's.
    """

    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    int8_input: bool = False

    @property
    def row_tiles(self) -> int:
        """Tiles along n."""
        return ceil_div(self.n, TILE_N)

    @property
    def k_tiles(self) -> int:
        """Tiles along k."""
        return ceil_div(self.k, TILE_K)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.k // self.group_size

    @property
    def passes(self) -> int:
        """Groups in a tile: 2 when they are 32 wide, else 1; 0 where integer sums run over all of k."""
        if self.int8_input and self.groups == 1:
            return 0
        return 2 if self.group_size == 32 and self.k > 32 else 1

    @property
    def stride(self) -> int:
        """Values in a padded row of x."""
        multiple = INT8_ROW_MULTIPLE if self.int8_input else ROW_MULTIPLE
        return ceil_div(self.k, multiple) * multiple

    @property
    def tile_words(self) -> int:
        """int32 words of all tiles."""
        return self.row_tiles * self.k_tiles * TILE_N * TILE_K * self.bits // 32


@dataclass(frozen=True)
class Launch:
    """One kernel: its C++ name expression, blocks, threads of a block, bytes of dynamic shared memory."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """`linear`, and `sum_splits` to add its parts where `splits` > 1."""

    linear: Launch
    splits: int = 1
    sum_splits: Launch | None = None


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for positive numbers."""
    return -(-a // b)


def why_not(
    bits: int, group_size: int, in_features: int, dtype: torch.dtype, has_zero_point: bool, input_bits: int
) -> str | None:
    """Why no kernel computes such a layer, or None where one does."""
    if has_zero_point:
        return "asymmetric weights"
    if bits not in (4, 8):
        return f"{bits}-bit weights"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations in {str(dtype).removeprefix('torch.')}"
    if group_size not in (32, in_features) and group_size % TILE_K:
        return f"groups of {group_size}"
    if input_bits and bits == 8 and group_size != in_features:
        return f"groups of {group_size} in 8-bit weights with {input_bits}-bit activations"
    if input_bits and in_features > MAX_INT8_INPUTS:
        return f"{input_bits}-bit activations of {in_features} inputs"
    return None


def runtime_scale_dtype(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Scales stay in the activations' type where they are in it, and else are float32: no bit is lost."""
    return dtype if stored == dtype else torch.float32


def plan(layer: Layer, m: int, multiprocessors: int) -> Plan:
    """How to multiply `m` tokens, 1 to 64, or any number where activations are INT8.

    Args:
        layer: what they are multiplied with.
        m: tokens.
        multiprocessors: of the device.
    """
    assert 1 <= m <= MEDIUM_TOKENS or layer.int8_input
    return _small(layer, m, multiprocessors) if m <= SMALL_TOKENS else _medium(layer, m, multiprocessors)


def _small(layer: Layer, m: int, multiprocessors: int) -> Plan:
    # Two row tiles a block read x half as often; one keeps twice the blocks. Two blocks fit a multiprocessor.
    rows = 2 if layer.row_tiles >= 4 * multiprocessors else 1
    grid = (ceil_div(layer.row_tiles, rows), ceil_div(m, SMALL_TOKENS), 1)
    return Plan(Launch(_name("linear_small", layer, rows), grid, SMALL_THREADS))


def _medium(layer: Layer, m: int, multiprocessors: int) -> Plan:
    tiles = token_tiles(layer, m)
    blocks, token_blocks = ceil_div(layer.row_tiles, MEDIUM_ROW_TILES), ceil_div(m, 8 * tiles)
    # One wave of blocks: every further split writes and reads another m * n floats.
    splits = max(1, min(multiprocessors // (blocks * token_blocks), layer.k_tiles // MIN_TILES_OF_SPLIT))
    linear = Launch(
        _name("linear_medium", layer, tiles), (blocks, splits, token_blocks), MEDIUM_THREADS, shared_bytes(layer, tiles)
    )
    if splits == 1:
        return Plan(linear)
    return Plan(linear, splits, Launch(_sum_splits(layer), (ceil_div(m * layer.n, SUM_THREADS), 1, 1), SUM_THREADS))


def token_tiles(layer: Layer, m: int) -> int:
    """NT of linear_medium: tiles of 8 tokens that a block multiplies; not 8 with groups of 32 (registers)."""
    largest = 4 if layer.passes == 2 else 8  # INT8 activations would fit, with few registers left
    return next((tiles for tiles in (2, 4) if m <= 8 * tiles), largest)


def shared_bytes(layer: Layer, tiles: int) -> int:
    """MEDIUM_SHARED_BYTES of linear_medium.cuh."""
    weights = MEDIUM_ROW_TILES * TILE_N * TILE_K * layer.bits // 8
    x = 8 * tiles * (TILE_K if layer.int8_input else (TILE_K + 8) * layer.dtype.itemsize)
    scale = MEDIUM_ROW_TILES * max(layer.passes, 1) * TILE_N * layer.scale_dtype.itemsize
    result = 8 * tiles * (MEDIUM_ROW_TILES * TILE_N + 1) * 4
    return max(MEDIUM_STAGES * (weights + x + scale), result)


def repack_launch(layer: Layer) -> Launch:
    """The kernel that makes the tiles; it depends on the width alone."""
    return Launch(f"qat::repack<{layer.bits}>", (ceil_div(layer.tile_words // 4, REPACK_THREADS), 1, 1), REPACK_THREADS)


def dequantize_launch(layer: Layer) -> Launch:
    """The kernel that makes a dense weight (n, stride) of the tiles."""
    tiles = layer.row_tiles * layer.k_tiles
    types = f"{TYPE_NAMES[layer.dtype]}, {TYPE_NAMES[layer.scale_dtype]}"
    name = f"qat::dequantize<{types}, {layer.bits}, {layer.passes}>"
    return Launch(name, (ceil_div(tiles, DEQUANTIZE_WARPS), 1, 1), 32 * DEQUANTIZE_WARPS)


def quantize_launch(kernel: str, dtype: torch.dtype, tokens: int, in_features: int) -> Launch:
    """The kernel `quantize_tokens` or `rmsnorm_quantize`: a block a token, whose row it keeps in shared memory."""
    row = ceil_div(in_features, INT8_ROW_MULTIPLE) * INT8_ROW_MULTIPLE * dtype.itemsize
    return Launch(f"qat::{kernel}<{TYPE_NAMES[dtype]}>", (tokens, 1, 1), QUANTIZE_THREADS, row)


def _name(kernel: str, layer: Layer, variant: int) -> str:
    result = TYPE_NAMES[layer.dtype]
    types = f"{'qat::s8' if layer.int8_input else result}, {result}, {TYPE_NAMES[layer.scale_dtype]}"
    return f"qat::{kernel}<{types}, {layer.bits}, {layer.passes}, {variant}>"


def _sum_splits(layer: Layer) -> str:
    """Float sums need no scale any more; those of integers are in units of 1 / 16 where weights are INT4."""
    unit = 16 if layer.int8_input and layer.bits == 4 else 1
    scale, total = (TYPE_NAMES[layer.scale_dtype], "int") if layer.passes == 0 else (TYPE_NAMES[layer.dtype], "float")
    return f"qat::sum_splits<{TYPE_NAMES[layer.dtype]}, {scale}, {total}, {unit}>"


def every_kernel() -> list[str]:
    """The name expressions of all kernels that a plan can name."""
    names = {f"qat::repack<{bits}>" for bits in (4, 8)}
    for dtype in (torch.float16, torch.bfloat16):
        names |= {quantize_launch(kernel, dtype, 1, 16).name for kernel in ("quantize_tokens", "rmsnorm_quantize")}
        for scale_dtype in (dtype, torch.float32):
            for bits, group_size, int8_input in (
                *((bits, group_size, False) for bits in (4, 8) for group_size in (32, 64)),
                *((4, group_size, True) for group_size in (32, 64, 128)),
                (8, 128, True),
            ):
                layer = Layer(16, 128, bits, group_size, dtype, scale_dtype, int8_input)
                variants = {token_tiles(layer, m) for m in range(9, MEDIUM_TOKENS + 1)}
                names |= {_name("linear_small", layer, rows) for rows in (1, 2)}
                names |= {_name("linear_medium", layer, tiles) for tiles in variants}
                names.add(_sum_splits(layer))
                if not int8_input:
                    names.add(dequantize_launch(layer).name)
    return sorted(names)
