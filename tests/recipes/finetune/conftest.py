"""A tiny encoder with its tokenizer, and a folder of tiny texts."""

import pytest
from finetune_cases import write_encoder, write_texts


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the model, and the folder of the texts."""
    folder = tmp_path_factory.mktemp("finetune")
    write_encoder(folder / "model")
    write_texts(folder / "texts")
    return folder
