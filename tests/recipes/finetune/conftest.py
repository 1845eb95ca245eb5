"""Tiny models with their tokenizer, and a folder of tiny texts."""

import pytest
from finetune_cases import write_model, write_texts


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the models and of the texts."""
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "model", "bert")
    write_model(folder / "gpt2", "gpt2")
    write_texts(folder / "texts")
    return folder
