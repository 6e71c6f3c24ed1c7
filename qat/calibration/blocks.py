"""Layer by layer: a calibration sees one block of a model at a time, with the inputs that the block before made.

    run() ── embedding ──▶ inputs ──▶ block 0 ──▶ inputs ──▶ block 1 ──▶ ... ──▶ run() ── norm, lm_head
             (once, caught)          treat, run              treat, run               (once, played back)

Only the inputs of one block are kept, on the CPU.  With `offload` the weights of finished blocks go to files and are
mapped back from there, so that their memory is the operating system's to take; a model whose weights are mapped from
files to begin with is then never resident as a whole.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import Cache

from qat.calibration.block_files import BlockFiles
from qat.fake_quantizer import Stage, real_tokens, token_mask
from qat.insertion import layers, set_stage
from qat.structure import keep_modes

log = logging.getLogger(__name__)

Run = Callable[[], None]
"""Runs the calibration data through a module, with padding announced by `token_mask`."""
Treat = Callable[[nn.Module, Run], None]
"""Calibrates one module given a `Run` of it; what every calibration is."""

# The bar of the stream that is under way, if one is.
_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)


@dataclass
class _Batch:
    """One batch on its way through the blocks."""

    hidden: Tensor  # (batch, tokens, features), on the CPU
    mask: Tensor | None  # (batch, tokens)
    autocast: torch.dtype | None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)  # of each block, besides hidden


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The chain of blocks that holds most quantized layers: its dotted name and the blocks; ("", []) if there is none.

    A chain is a `ModuleList`; the outermost one counts, so that a block's experts are not taken for blocks.
    """
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = layers(module)
            count = len(inside)
            # Blocks of convolutions change the shape of what they pass on, so that none can stand in for the rest.
            if count > best[0] and all(layer.kind != "conv" for layer in inside.values()):
                best = (count, name, list(module))
    return best[1], best[2]


def steps(count: int, description: str) -> Iterator[int]:
    """0 to count - 1, with a bar below that of the blocks while `stream` shows one."""
    progress = _progress.get()
    if progress is None:
        yield from range(count)
        return
    task = progress.add_task(description, total=count)
    try:
        for step in range(count):
            yield step
            progress.advance(task)
    finally:
        progress.remove_task(task)


@torch.no_grad()
def stream(
    model: nn.Module,
    run: Run,
    treat: Treat,
    method: str,
    sequential: bool = True,
    folder: Path | None = None,
    key: str = "",
    offload: bool = False,
    targets: list[Tensor] | None = None,
) -> None:
    """Call `treat(block, run_block)` for every block in turn, then for what lies outside the blocks.

    A model without blocks is treated whole, and so is a block of a stream that is under way: its experts are no chain.

    Args:
        model: with fake quantizers inserted.
        run: runs the calibration data through `model`, the same batches in the same order every time.
        treat: calibrates a module in place; leaves its quantizers in `Stage.FLOAT`.
        method: what messages and the progress bar call it.
        sequential: each block sees the outputs of the quantized blocks before it; else of the float ones.
        folder: where finished blocks are kept, so that a killed calibration goes on; None keeps nothing.
        key: identifies everything that `treat` depends on besides weights and inputs.
        offload: map the weights of finished blocks from their files; needs `folder`.
        targets: filled, before each block is treated, with what the float model has behind it: (batch, tokens,
            features) of each batch, on the CPU.

    Raises:
        ValueError: from `treat`, with the block's name before it; the data has no usable token; or the blocks are no
            chain, each called with the output of the one before.
    """
    if offload and folder is None:
        raise ValueError(f"calibration {method}: offload keeps finished blocks in files; give it a folder")
    name, blocks = find_blocks(model)
    if not blocks or _progress.get() is not None:
        treat(model, run)
        return
    files = BlockFiles(folder, f"{key}, sequential={sequential}") if folder is not None else None
    batches = _caught(blocks, run, method)
    if targets is not None:
        targets[:] = [batch.hidden for batch in batches]
    with _bar() as progress:
        for index, block in enumerate(progress.track(blocks, description=f"{method}, block by block")):
            outputs = partial(_outputs, block, index, batches)
            if targets is not None:
                for position, target in enumerate(_outputs(block, index, batches, targets)):
                    targets[position] = target
            if not layers(block):
                _advance(batches, outputs())
                continue
            after = None if sequential else list(outputs())
            inputs = [(b.hidden, b.mask) for b in batches] + [(target, None) for target in targets or ()]
            path = files.path(f"{name}.{index}", block, inputs) if files else None
            if files is None or path is None:
                _treat(treat, block, outputs, f"{name}.{index}")
            else:
                if offload:
                    _own(block)
                if not files.restore(path, block):
                    _treat(treat, block, outputs, f"{name}.{index}")
                    files.save(path, block)
                if offload:
                    files.map(path, block)
            set_stage(block, Stage.FROZEN)
            _advance(batches, outputs() if after is None else after)
            set_stage(block, Stage.FLOAT)
    _outside(model, blocks, run, treat, batches)


@contextmanager
def _bar() -> Iterator[Progress]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        token = _progress.set(progress)
        try:
            yield progress
        finally:
            _progress.reset(token)


def _outside(model: nn.Module, blocks: list[nn.Module], run: Run, treat: Treat, batches: list[_Batch]) -> None:
    """Treat the quantized layers that are in no block, an output layer for one."""
    inside = {id(layer) for block in blocks for layer in layers(block).values()}
    rest = nn.Module()
    for name, layer in layers(model).items():
        if id(layer) not in inside:
            rest.add_module(name.replace(".", "/"), layer)
    if layers(rest):
        treat(rest, lambda: _play(blocks, run, batches))


def _caught(blocks: list[nn.Module], run: Run, method: str) -> list[_Batch]:
    """What `run` gives to the first block, and the further arguments it gives to each; no block computes."""
    batches: list[_Batch] = []
    previous: list[Tensor] = []

    def catch(index: int, *args: Any, **kwargs: Any) -> Tensor:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        if index == 0:
            kind = hidden.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            batches.append(_Batch(hidden.detach().cpu(), real_tokens(), autocast))
        elif hidden is not previous[0]:
            raise ValueError(
                f"calibration {method}: block {index} is not called with the output of block {index - 1}, so the "
                "model cannot be calibrated block by block"
            )
        # No cache: every replay would append to it.
        args = tuple(None if isinstance(value, Cache) else value for value in rest)
        batches[-1].calls.append((args, {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}))
        previous[:] = [hidden]
        return hidden

    with _forwards(blocks, catch):
        run()
    if not any(batch.mask is None or bool(batch.mask.any()) for batch in batches):
        raise ValueError(
            f"calibration {method}: the calibration data has no usable token; more documents, or fewer masked ones"
        )
    return batches


def _play(blocks: list[nn.Module], run: Run, batches: list[_Batch]) -> None:
    """`run()` with what the last block gave in place of all blocks."""
    finished = iter(batches)

    def play(index: int, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        return next(finished).hidden.to(hidden.device) if index == 0 else hidden

    with _forwards(blocks, play):
        run()


@contextmanager
def _forwards(blocks: list[nn.Module], replacement: Callable[..., Tensor]) -> Iterator[None]:
    """Within, calling block i calls `replacement(i, ...)`."""
    # A forward of the block's own, compiled or one that moves its inputs to the block's device, is put back.
    own = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = partial(replacement, index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


def _outputs(
    block: nn.Module, index: int, batches: list[_Batch], inputs: list[Tensor] | None = None
) -> Iterator[Tensor]:
    """What `block`, in evaluation mode, makes of each batch, or of `inputs` in its place, on the CPU, one at a time."""
    device = next(block.parameters()).device
    with keep_modes(block):
        block.eval()
        for position, batch in enumerate(batches):
            hidden = batch.hidden if inputs is None else inputs[position]
            args, kwargs = batch.calls[index]
            enabled = batch.autocast is not None
            with torch.autocast(device.type, dtype=batch.autocast, enabled=enabled), token_mask(batch.mask):
                output = block(hidden.to(device), *args, **kwargs)
            yield (output[0] if isinstance(output, tuple) else output).cpu()


def _advance(batches: list[_Batch], outputs: Iterable[Tensor]) -> None:
    """Make `outputs` the inputs of the next block, one batch at a time: both are never held whole."""
    for batch, output in zip(batches, outputs, strict=True):
        batch.hidden = output


def _own(block: nn.Module) -> None:
    """Give the block's parameters on the CPU memory of their own.

    Written to where they are mapped from a file, they would leave private pages behind that only go with the whole
    mapping, which holds all blocks.
    """
    for parameter in block.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _treat(treat: Treat, block: nn.Module, outputs: Callable[[], Iterator[Tensor]], where: str) -> None:
    try:
        treat(block, lambda: deque(outputs(), maxlen=0))  # type: ignore[arg-type, return-value]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
