"""Causal language models and their tokenizers: from a hub, from a folder, from the package, or from nothing."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat.data.documents import Document

EMBEDDED = {"stdlib_llama": Path(__file__).parent.parent / "assets" / "stdlib_llama"}

# Roles are single tokens, so a chat template never has to parse text.
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A pretrained causal language model and its tokenizer.

    Args:
        name: `stdlib_llama` (shipped with the package), a local folder, or a model's name on the hub.
        dtype: of the loaded parameters; training masters are float32 unless `trainer.precision=bf16-true`.

    Returns:
        (model, tokenizer), the model on the CPU.

    Raises:
        ValueError: the folder is missing or unreadable, or a parameter is absent, NaN or infinite.
    """
    path = EMBEDDED.get(name, Path(name))
    local = path.exists()
    if local and not (path / "config.json").is_file():
        raise ValueError(f"model {name}: {path} has no config.json, so it is not a Hugging Face model folder")
    if not local and name.startswith((".", "/", "~")):
        raise ValueError(f"model {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if local else name)
        loaded = AutoModelForCausalLM.from_pretrained(
            path if local else name, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except Exception as error:
        hint = "is the folder complete?" if local else "is it a folder here, or a name on the hub you can reach?"
        raise ValueError(f"model {name} cannot be loaded ({hint}): {type(error).__name__}: {error}") from error
    return complete(name, loaded), tokenizer


def complete(name: str, loaded: Any) -> Any:
    """The model of what `from_pretrained(..., output_loading_info=True)` returned.

    Raises:
        ValueError: a parameter is absent from the checkpoint, NaN or infinite.
    """
    model, info = loaded
    if info["missing_keys"]:  # transformers would go on with random values
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model {name}: its checkpoint lacks {len(missing)} parameters, such as {missing[0]}")
    check_finite(model)
    return model


def check_finite(model: torch.nn.Module) -> None:
    """Raise ValueError naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"parameter {name} holds {bad} NaN or infinite values of {parameter.numel()}: "
                "the checkpoint is damaged or its training diverged; start from an earlier one"
            )


def check_positions(model: torch.nn.Module, tokens: int, key: str) -> None:
    """Raise ValueError, naming `key` of that many tokens a window, if the model has fewer positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"{key}={tokens} is longer than the model's {limit} positions")


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (every string round-trips) trained on `documents`, with roles for a simple chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer, length=len(documents))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_llama(name: str, source: Any, vocab_size: int, seed: int = 0, **dimensions: Any) -> tuple[Any, Any]:
    """A randomly initialised Llama, with a tokenizer trained on the training split of `source`.

    Args:
        name: what summaries call the model.
        source: documents, or a function that returns them.
        vocab_size: of the tokenizer and the model.
        seed: of the initial weights.
        dimensions: further fields of `transformers.LlamaConfig`, such as `hidden_size`.
    """
    documents = [d for d in (source() if callable(source) else source) if d.split == "train"]
    tokenizer = train_tokenizer(documents, vocab_size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **dimensions,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer
