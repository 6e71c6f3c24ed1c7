"""The command `qat`: training through Hydra, and small tools that take paths.

Nothing heavy is imported before a subcommand runs, so that `qat --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, 2 for a wrong call or input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before = argv[: argv.index("train")] if "train" in argv else None
    if before in ([], ["--traceback"]):
        # Hydra's own options would collide with argparse's, and its --help knows every choice.
        return _guarded(lambda: _train(argv[len(before) + 1 :], bool(before)), bool(before))
    args = _parser().parse_args(argv)
    return _guarded(lambda: args.run(args), args.traceback)


def _guarded(run: Callable[[], None], traceback: bool) -> int:
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `qat ... | head` has read enough; the interpreter must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qat",
        description="Quantization-aware training that ends in a verified packed INT8/INT4 model.",
        epilog="""\
examples:
  qat train recipe=llama_int4_qat            train through fake quantization, export, report
  qat generate RUN/export "def main("        what the packed model writes
  qat bench RUN/export --backend cpu         how many tokens a second
  qat compare multirun/                      the runs of a sweep side by side

`qat COMMAND --help` explains each command.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from (before the command)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_generate(commands)
    _add_bench(commands)
    _add_eval(commands)
    _add_inspect(commands)
    _add_compare(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., None], summary: str, about: str, examples: str) -> Any:
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {about}",
        epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: Any) -> None:
    # For `qat --help` alone: `main` hands everything after `train` to Hydra, whose help knows every choice.
    commands.add_parser("train", help="train, quantize, export and report, as a recipe says")


def _train(rest: list[str], traceback: bool = False) -> None:
    if traceback:
        os.environ["QAT_TRACEBACK"] = "1"  # Hydra runs the job in a place that flags of ours do not reach
    from qat.main import main as hydra_main

    sys.argv = ["qat train", *rest]
    hydra_main()


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands, "generate", _generate, "continue a prompt with a packed (or float) model",
        "Text appears as it\nis generated.",
        """\
  qat generate outputs/RUN/export "def fibonacci(n):" --max-new-tokens 80
  qat generate outputs/RUN/export "What is a lambda?" --chat --temperature 0.8 --seed 1""",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument("prompt", help="the text to continue; with --chat, the user's message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")


def _add_model(parser: Any) -> None:
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="an exported folder, or a Hugging Face model folder"
    )
    parser.add_argument(
        "--backend", choices=("reference", "torch", "cpu", "cuda", "auto"), default="reference",
        help="what multiplies packed layers: reference computes what training did, cpu (qat's kernels, compiled at "
        "first use) and torch are faster, auto takes the fastest of these that works, cuda needs an NVIDIA GPU, on "
        "which its kernels have not run yet; float models run in torch, with cuda on the GPU (%(default)s)",
    )  # fmt: skip


def _generate(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive, got {args.max_new_tokens}")
    if args.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {args.temperature}")
    import torch

    from qat.inference import stream

    model, tokenizer = _load(args.directory, args.backend)
    torch.manual_seed(args.seed)
    pieces = stream(
        model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, chat=args.chat
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _load(directory: Path, backend: Any, text: bool = True) -> tuple[Any, Any]:
    """A packed model where the folder says that something is quantized, else a float one; `text`: it reads some."""
    if not (directory / "config.json").is_file():
        what = "has no config.json" if directory.is_dir() else "is no folder"
        raise ValueError(f"{directory} {what}: give an exported folder (RUN/export) or a Hugging Face model folder")
    if _is_packed(directory):
        from qat.inference import load_packed

        model, tokenizer = load_packed(directory, backend=backend, device="cuda" if backend == "cuda" else "cpu")
        if text and tokenizer is None:  # image classifiers have none
            raise ValueError(f"{directory} has no tokenizer: copy tokenizer.json of the float language model into it")
        return model, tokenizer
    import torch
    from transformers.utils.logging import disable_progress_bar

    from qat.tasks import image_models, models

    disable_progress_bar()  # output that is piped is the model's text or figures, nothing else
    if backend == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--backend cuda: torch finds no GPU for the float model in {directory}; leave --backend out")
    images = not text and "ForImageClassification" in (directory / "config.json").read_text()
    model, tokenizer = (image_models if images else models).load(str(directory))
    model.requires_grad_(False)  # what is not trained has a fused decoder
    return model.to("cuda" if backend == "cuda" else "cpu"), tokenizer


def _is_packed(directory: Path) -> bool:
    described: dict[str, Any] = {}
    for path in filter(Path.is_file, (directory / "qat.json", directory / "config.json")):
        try:
            described |= json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): export the model again") from error
    return "quantization_config" in described or described.get("kv_cache") is not None


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands, "bench", _bench, "measure the speed and memory of a packed or float model",
        """Prefill is reading a prompt, which
multiplies many tokens at once; decode is writing tokens one after the other, which reads every weight for each and
is what packed weights make faster. A larger batch shares that reading: tokens/s rise, each sequence's do not.
Prompts are random; medians after a warm-up. Compare figures of one quiet machine only, and the float model's
folder with the packed one's.""",
        """\
  qat bench outputs/RUN/export --backend cpu
  qat bench outputs/RUN/export --backend cpu --batch 1 8 32 --threads 8
  qat bench ./float_model""",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="sequences at once (1)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of each sequence (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of each sequence (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (torch's choice)")


def _bench(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be positive, got {args.threads}")
    import torch

    from qat.inference.bench import speed, tensor_bytes

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, _ = _load(args.directory, args.backend)
    where = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else torch.cuda.get_device_name()
    speeds = [speed(model, batch, args.prompt_tokens, args.new_tokens) for batch in args.batch]
    print(f"model  {args.directory}, {tensor_bytes(model) / 1e6:.1f} MB, {model.dtype} on {where}")
    print(f"run    {args.prompt_tokens} prompt tokens and {args.new_tokens} new ones a sequence")
    print(f"{'batch':>5}  {'prefill tokens/s':>16}  {'decode tokens/s':>15}  {'cache MB':>8}")
    for s in speeds:
        print(f"{s.batch:>5}  {s.prefill:>16.1f}  {s.decode:>15.1f}  {s.cache_bytes / 1e6:>8.1f}")


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", _eval, "measure the loss of a packed or float model on text",
        """Prints nats per token with the
95 % bootstrap interval over documents, perplexity, and next-token accuracy. The same data, split and lengths
give the figures that a run reports.""",
        """\
  qat eval outputs/RUN/export --data python_stdlib
  qat eval ./my_model --data notes/ --split all
  qat eval outputs/RUN/export --data chat:conversations.jsonl --split all""",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="python_stdlib, a text file or folder, or chat:FILE.jsonl"
    )
    parser.add_argument(
        "--split", choices=("test", "validation", "all"), default="test",
        help="which documents: those held out from training by qat, or all (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens a window (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows at once (%(default)s)")
    parser.add_argument(
        "--windows-per-document", type=int, default=4, metavar="N",
        help="taken from each document at most (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--separator", metavar="TEXT", help="splits a text file into documents")


def _eval(args: argparse.Namespace) -> None:
    loader_of = _data(args)  # before the model: a wrong path should not wait for it
    from rich.console import Console
    from rich.progress import track

    from qat.evaluation import evaluate, loss_interval
    from qat.tasks.causal_lm import CausalLM
    from qat.tasks.models import check_positions

    model, tokenizer = _load(args.directory, args.backend)
    check_positions(model, args.seq_len, "--seq-len")
    loader = loader_of(tokenizer)
    progress = track(loader, "evaluating", console=Console(stderr=True), transient=True)
    losses = evaluate(CausalLM(model, lr=0.0), progress)
    documents, interval = int((losses.tokens > 0).sum()), loss_interval(losses)
    brackets = "[{:.4f}, {:.4f}]".format(*interval) if interval else "(no interval: one document)"
    print(f"loss        {losses.loss:.4f} nats/token {brackets}")
    print(f"perplexity  {losses.perplexity:.3f}")
    print(f"accuracy    {100 * losses.accuracy:.2f} % of the next tokens")
    print(f"data        {args.data}, {args.split}: {documents} documents, {int(losses.tokens.sum()):,} tokens")


def _data(args: argparse.Namespace) -> Callable[[Any], Iterable[Any]]:
    """A function from a tokenizer to the batches that `--data` and `--split` name."""
    from torch.utils.data import DataLoader

    from qat.data import documents
    from qat.data.chat import ChatData
    from qat.data.language import LanguageData

    sizes = {"seq_len": args.seq_len, "batch_size": args.batch_size}
    if args.data.startswith("chat:"):
        data: LanguageData = ChatData(args.data.removeprefix("chat:"), **sizes)
    else:
        known = args.data == "python_stdlib"
        source = documents.python_stdlib() if known else documents.text(args.data, separator=args.separator)
        data = LanguageData(source, name=args.data, windows_per_document=args.windows_per_document, **sizes)
    chosen = [d for d in data.documents if args.split in ("all", d.split)]
    if not chosen:
        raise ValueError(
            f"none of the {len(data.documents)} documents of {args.data} is in the {args.split} split: use "
            "--split all, or --separator to cut a text file into documents"
        )

    def batches(tokenizer: Any) -> DataLoader:
        data.tokenizer = tokenizer
        # Not `data.split`, which would tokenize all splits and refuse data in which another one is empty.
        return DataLoader(data._windows("test", chosen), batch_size=args.batch_size)

    return batches


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", _inspect, "list the layers of a packed model",
        """Scheme, shape, bytes and the range of the
scales of each; with --against, how far the weights are from those of a float model.""",
        """\
  qat inspect outputs/RUN/export
  qat inspect outputs/RUN/export --against ./float_model""",
    )  # fmt: skip
    parser.add_argument("directory", metavar="DIR", type=Path, help="an exported folder")
    parser.add_argument(
        "--against", type=Path, metavar="FLOAT_DIR",
        help="a float model folder with the same layers; adds the error |packed - float| / |float|",
    )  # fmt: skip


def _inspect(args: argparse.Namespace) -> None:
    from rich.console import Console

    from qat.report.table import layers_table

    if not (args.directory / "config.json").is_file() or not _is_packed(args.directory):
        raise ValueError(f"{args.directory} is not a packed model: give a folder that a run exported (RUN/export)")
    model, _ = _load(args.directory, "reference", text=False)
    whole = None if args.against is None else _load(args.against, "reference", text=False)[0]
    rows = _layers(model, whole, args.against)
    packed = {row["name"] for row in rows}
    rest = sum(tensor.nbytes for name, tensor in model.named_parameters() if name.rpartition(".")[0] not in packed)
    cache = next((module.kv_cache.extra_repr() for module in model.modules() if hasattr(module, "kv_cache")), None)
    Console().print(layers_table(rows, rest, cache))


def _layers(model: Any, whole: Any, against: Path | None) -> list[dict[str, Any]]:
    """One row a packed layer: name, scheme, shape, bytes, float_bytes (at 16 bits), scale_range, error."""
    from qat.functional import dequantize
    from qat.inference import PackedLinear
    from qat.inference.packed_layers import PackedConv2d, PackedEmbedding
    from qat.nn import LAYERS
    from qat.packing import unpack
    from qat.structure import LinearExperts, fold_batch_norms, unfuse_experts

    if whole is not None:  # in the form in which it was quantized
        parts = dict(model.named_modules())
        unfuse_experts(whole, lambda name: isinstance(parts.get(name), LinearExperts))
        fold_batch_norms(whole, lambda name: isinstance(parts.get(name), PackedConv2d))
    rows: list[dict[str, Any]] = []
    seen = set()  # the table of a tied pair counts once
    for name, layer in model.named_modules():
        if not isinstance(layer, (PackedLinear, PackedEmbedding, PackedConv2d)) or id(layer.packed) in seen:
            continue
        seen.add(id(layer.packed))
        row = {
            "name": name,
            "scheme": str(layer.scheme),
            "shape": [layer.out_features, layer.in_features],
            "bytes": sum(tensor.nbytes for tensor in layer.buffers()),
            "float_bytes": 2 * layer.out_features * layer.in_features,
            "scale_range": [float(layer.scale.abs().min()), float(layer.scale.abs().max())],
            "error": None,
        }
        if whole is not None:
            original: Any = dict(whole.named_modules()).get(name)
            weight = LAYERS[type(original)].as_matrix(original.weight.detach()) if type(original) in LAYERS else None
            if weight is None or list(weight.shape) != row["shape"]:
                raise ValueError(f"{against} has no layer {name} of shape {row['shape']}: is it the same architecture?")
            spec = layer.scheme.weight
            found = dequantize(unpack(layer.packed, spec.bits, layer.in_features, spec.spacing), layer.scale)
            row["error"] = float((found - weight.float()).norm() / weight.float().norm())
        rows.append(row)
    return rows


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands, "compare", _compare, "put runs side by side",
        "Folders are searched for runs; those that differ only in their\nseed get a row with the mean.",
        """\
  qat compare outputs/A outputs/B
  qat compare multirun/2025-11-23_17-20-00
  qat compare multirun/ --json > runs.json""",
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders, or folders above them")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _compare(args: argparse.Namespace) -> None:
    from rich.console import Console

    from qat.report.summary import find_runs, read_summary
    from qat.report.table import compare_rows, compare_table

    summaries = [read_summary(run) for run in find_runs(args.runs)]
    if args.json:
        print(json.dumps(compare_rows(summaries), indent=2))
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=200)
    console.print(compare_table(summaries, console.width))


if __name__ == "__main__":
    sys.exit(main())
