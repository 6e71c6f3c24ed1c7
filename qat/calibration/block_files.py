"""Finished blocks of a calibration in files, so that a killed one goes on, and an equal one is not done twice.

A block's file is named by the digest of all it depends on: the method, the block's weights before, its inputs.  So a
file is used exactly where the calibration would compute the same again, whoever asks.
"""

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.attention import key_values
from qat.insertion import layers

log = logging.getLogger(__name__)


class BlockFiles:
    """The files of one calibration.

    Args:
        folder: created; holds one safetensors file a finished block.
        key: identifies the method and its settings.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, block: nn.Module, inputs: list[tuple[Tensor, Tensor | None]]) -> Path:
        """The file of `block` (its weights as they are before calibration) for `inputs`: (hidden, mask) by batch."""
        schemes: dict[str, object] = {n: layer.scheme.to_dict() for n, layer in layers(block).items()}
        schemes |= {f"{n}.kv_cache": kept.spec for n, kept in key_values(block).items()}
        total = hashlib.sha256(f"{self.key} {name} {schemes} torch {torch.__version__}".encode())
        for key, tensor in block.state_dict().items():
            if not key.endswith(("quantizer.scale", "quantizer.offset", "quantizer.stage")):  # what calibration sets
                total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(_bytes(tensor))
        for hidden, mask in inputs:
            total.update(_bytes(hidden))
            total.update(b"all" if mask is None else _bytes(mask))
        return self.folder / f"{name}-{total.hexdigest()[:16]}.safetensors"

    def save(self, path: Path, block: nn.Module) -> None:
        """Write the block's state, atomically."""
        # Copies: layers that share a quantizer have its tensors under several names, which the format does not know.
        tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in block.state_dict().items()}
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as temporary:
            pass
        try:
            save_file(tensors, temporary.name)
            os.replace(temporary.name, path)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise

    def restore(self, path: Path, block: nn.Module) -> bool:
        """Give `block` the state in the file; False where there is none, or a damaged one (which is logged)."""
        if not path.exists():
            return False
        try:
            block.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            log.warning("%s is damaged (%s): this block is calibrated again", path, error)
            return False
        return True

    def map(self, path: Path, block: nn.Module) -> None:
        """Map the parameters of `block`, where on the CPU, from its file: pages the system may drop and read again."""
        mapped = load_file(path)
        for name, parameter in block.named_parameters():
            if parameter.device.type == "cpu":
                parameter.data = mapped[name]


def _bytes(tensor: Tensor) -> Any:
    """The tensor's memory, as a buffer."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
