"""Image classifiers: from a hub, from a folder, from the package, or from nothing."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from qat.tasks.models import complete

EMBEDDED = {"digits_cnn": Path(__file__).parent.parent / "assets" / "digits_cnn"}


def load(name: str, dtype: str = "float32") -> tuple[Any, None]:
    """A pretrained image classifier, on the CPU; there is no tokenizer.

    Args:
        name: `digits_cnn` (shipped with the package), a local folder, or a model's name on the hub.
        dtype: of the loaded parameters.

    Raises:
        ValueError: the model cannot be read, or a parameter is absent, NaN or infinite.
    """
    path = EMBEDDED.get(name, name)
    try:
        loaded = AutoModelForImageClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"image model {name} cannot be loaded: {type(error).__name__}: {error}") from error
    return complete(name, loaded), None


def new_resnet(name: str, seed: int = 0, **dimensions: Any) -> tuple[Any, None]:
    """A ResNet of random weights.

    Args:
        name: what summaries call the model.
        seed: of the initial weights.
        dimensions: fields of `transformers.ResNetConfig`.
    """
    torch.manual_seed(seed)
    return ResNetForImageClassification(ResNetConfig(**dimensions)), None
