"""Memory of the anchors of a model of language, by how the reference is kept: ``python -m benchmarks.language``."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.memory import LiveMemory
from fipoptim import AnchorBatch
from recipes.common.options import SEED, whole

STORES: tuple[Any, ...] = ("full", "half", 32, "live")


class Language(nn.Module):
    """A causal transformer of one layer, whose head is its table of embeddings."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the next token at each position, shape ``(N, T, vocabulary)``."""
        causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        hidden = self.layer(self.embedding(input_ids), src_mask=causal, is_causal=True)
        logits: Tensor = hidden @ self.embedding.weight.T
        return logits


def kept_bytes(anchors: AnchorBatch) -> int:
    """The bytes of what the anchors keep: inputs, reference outputs and copies of weights."""
    tensors = list(vars(anchors)["inputs"].values())
    references = anchors.references
    tensors += [] if references.outputs is None else [references.outputs]
    for network in references.networks:
        tensors += [x for part in vars(network)["weights"] for x in part.values()]
    return sum(x.nbytes for x in tensors)


def measure(model: nn.Module, texts: dict[str, Tensor], store: Any, chunk: int) -> dict[str, Any]:
    """Bytes and seconds of anchors with one store, and the drift after no change of the weights."""
    start = time.perf_counter()
    with LiveMemory() as construction:
        anchors = AnchorBatch(model, texts, output="nats_per_token", store=store, chunk_size=chunk)
    seconds = [time.perf_counter() - start]
    start = time.perf_counter()
    with LiveMemory() as passed:
        drift = anchors.drift()
    seconds.append(time.perf_counter() - start)
    return {
        "store": store,
        "kept_mb": kept_bytes(anchors) / 1e6,
        "peak_construction_mb": construction.peak / 1e6,
        "peak_drift_mb": passed.peak / 1e6,
        "seconds_construction": seconds[0],
        "seconds_drift": seconds[1],
        "drift_of_rounding": drift,
    }


def main() -> None:
    """Measures each store, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anchors", type=whole(1), default=20)
    parser.add_argument("--length", type=whole(1), default=128)
    parser.add_argument("--vocabulary", type=whole(40), default=50_257)
    parser.add_argument("--width", type=whole(2), default=64)
    parser.add_argument("--chunk-size", type=whole(1), default=4)
    parser.add_argument("--seed", type=SEED, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = Language(arguments.vocabulary, arguments.width)
    ids = torch.randint(arguments.vocabulary, (arguments.anchors, arguments.length))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = []
    for store in STORES:
        rows.append(measure(model, texts, store, arguments.chunk_size))
        print(json.dumps(rows[-1]), flush=True)
    measurements = {
        "config": vars(arguments),
        "weights_mb": sum(p.nbytes for p in model.parameters()) / 1e6,
        "stores": rows,
    }
    record.write(record.RESULTS / "language.json", "language", torch.device("cpu"), measurements)


if __name__ == "__main__":
    main()
