"""Keep the terminal for what the user can act on."""

import logging
import warnings

import transformers


def quiet() -> None:
    """Silence the libraries' progress bars, notices and warnings about what is meant to be so."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*GPU available but not.*",
        ".*your dataloader is not resumable.*",  # the datamodule is
        ".*Checkpoint directory .* exists and is not empty.*",  # that is what resuming means
    ):
        warnings.filterwarnings("ignore", message)
