"""Tiny random models, built here: nothing is downloaded, everything is saved and loaded like a real checkpoint."""

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cla_convert.console import hush

torch.set_num_threads(1)  # models this small only wait for each other's threads


def pytest_collection_finish() -> None:
    """Hundreds of thousands of imported objects are no garbage: nobody looks through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Nothing passes, or fails, by the numbers it drew."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nobody_stays_hushed() -> Iterator[None]:
    """`-q` of a command that a test runs in this process is that test's alone."""
    yield
    hush(False)


def wait_for(reached: Callable[[], object]) -> None:
    """Until it is so; of a busy machine nobody knows how long that takes."""
    for _ in range(30_000):
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and two specials: any text round-trips, vocabulary 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|bos|>": 0, "<|eos|>": 1} | {token: i + 2 for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")


class Counting:
    """A tokenizer that remembers how many characters it was given at once."""

    def __init__(self) -> None:
        self.inner, self.given = byte_tokenizer(), list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, text: Any, **options: Any) -> Any:
        self.given.append(sum(map(len, text)) if isinstance(text, list) else len(text))
        return self.inner(text, **options)


def tiny_llama_config(**overrides) -> LlamaConfig:
    """6 layers, 4 query heads on 2 KV heads of 8 channels."""
    settings = dict(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaConfig(**(settings | overrides))


def save_tiny_llama(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides) -> Path:
    """Save a random tiny Llama and its tokenizer into `folder`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**overrides)).eval()
    for name, parameter in model.named_parameters():  # biases start at zero: make them count
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Test licence\n")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of our own: the tests prove the first run, and nothing of the user's is read or touched."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CLA_CONVERT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random GQA Llama with tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
