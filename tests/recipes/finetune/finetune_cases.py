"""A tiny BERT, tiny texts, and short settings for the tests of ``recipes.finetune``."""

import json
import random

import pytest
import torch
import transformers

from recipes.finetune.command import main

KINDS = {
    "birds": "owl wren crow hawk nest wing feather sings",
    "boats": "mast sail hull keel deck anchor harbour drifts",
    "bread": "flour yeast oven crust dough salt baker rises",
    "games": "chess board dice card pawn queen player wins",
    "rocks": "granite slate quartz cliff sand marble layer erodes",
}
COMMON = ["the", "a", "one", "old", "new", "small", "very", "is", "was", "and", "of", "in"]
SHORT = ["--no-progress", "--kinds", "birds", "boats", "--steps", "4", "--batch-size", "8"]
SHORT += [
    "--anchors",
    "12",
    "--anchor-batch",
    "6",
    "--check",
    "8",
    "--head",
    "5",
    "--train",
    "6",
    "--test",
    "10",
]
SHORT += ["--queries", "15", "--index", "20", "--max-tokens", "12", "--rank", "2"]


def write_texts(folder, each=40):
    """Writes a file for each kind, with a line of ``%`` between its texts."""
    folder.mkdir()
    draw = random.Random(0)
    for name, words in KINDS.items():
        texts = set()
        while len(texts) < each:
            length = draw.randint(4, 9)
            texts.add(
                " ".join(draw.choice(draw.choice([words.split(), COMMON])) for _ in range(length))
            )
        (folder / name).write_text("\n%\n".join(sorted(texts)) + "\n%\n")


def write_model(folder, kind):
    """Writes a BERT or a GPT-2 of 2 layers with a WordPiece tokenizer of whole words."""
    folder.mkdir()
    words = sorted({*" ".join(KINDS.values()).split(), *COMMON})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    size = len(special) + len(words)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(
                vocab_size=size,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=32,
            )
            transformers.BertModel(config).save_pretrained(folder)
        else:
            config = transformers.GPT2Config(
                vocab_size=size,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=32,
                bos_token_id=2,
                eos_token_id=3,
            )
            transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def arguments(tiny, out):
    return ["--model", str(tiny / "model"), "--texts", str(tiny / "texts"), "--out", str(out)]


def run(tiny, out, *more):
    """Runs the recipe and returns its results."""
    assert main([*SHORT, *arguments(tiny, out), *more]) == 0
    return json.loads((out / "results.json").read_text())


def refusal(capsys, *given):
    with pytest.raises(SystemExit) as stop:
        main(list(given))
    assert stop.value.code == 2
    return capsys.readouterr().err
