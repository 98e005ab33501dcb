"""GGUF headers, read here in milliseconds, against what transformers makes of the same file."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from cla_convert.errors import InputError
from cla_convert.models.gguf_header import read_gguf_header
from cla_convert.models.shape import shape_of
from cla_convert.models.source import open_headers, resolve_source

ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3", "starcoder2", "gemma2", "gemma3", "qwen3moe"]


def write_gguf(path: Path, architecture: str, head_dim: int = 16, **numbers: int) -> Path:
    """A file with the metadata that llama.cpp writes, a vocabulary that is worth skipping, and one tensor."""
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_file_type(1)
    writer.add_block_count(12)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_context_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(128)
    writer.add_token_list([f"token {i}" for i in range(2000)])
    writer.add_token_scores([0.5] * 2000)
    writer.add_array("general.tags", ["text", "tiny"])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("token_embd.weight", np.zeros((2000, 64), dtype=np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_attention_is_what_transformers_reads(architecture, tmp_path):
    # transformers takes the head size of some families, and the window of Phi-3, from defaults, whatever the file says
    path = write_gguf(tmp_path / "tiny.gguf", architecture, head_dim=128 if architecture == "qwen3" else 16)
    theirs = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    ours = read_gguf_header(path).config()
    if architecture == "phi3":
        assert ours.pop("sliding_window") == 128
    assert ours.items() <= theirs.items()
    assert shape_of(ours) == shape_of(AutoConfig.for_model(**theirs).to_dict())


def test_shapes_and_metadata_behind_long_vocabularies(tmp_path):
    header = read_gguf_header(write_gguf(tmp_path / "tiny.gguf", "llama"))
    assert header.shapes == {"token_embd.weight": (2000, 64)}
    assert header.metadata["tokenizer.ggml.tokens"] is header.metadata["tokenizer.ggml.scores"] is None
    assert header.metadata["general.tags"] == ["text", "tiny"]
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert open_headers(str(tmp_path / "tiny.gguf")).tensors["token_embd.weight"].numel == 128_000


def test_unsupported_and_broken_files_are_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "falcon")
    with pytest.raises(InputError, match="code of its own"):
        resolve_source(str(path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot be read as a GGUF model"):
        resolve_source(str(path))
    path.write_bytes(b"GGML" + path.read_bytes()[4:])
    with pytest.raises(InputError, match="does not begin as a GGUF file"):
        open_headers(str(path))


@pytest.mark.parametrize("missing", [1, 1000, 200_000])
def test_half_a_file_is_told_by_its_header(tmp_path, missing):
    """As whatever reads headers alone sees it: `inspect`, and the plan of a dry run."""
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    whole = path.read_bytes()
    end = read_gguf_header(path).places["token_embd.weight"].start + 2000 * 64 * 2
    open_headers(str(path))
    path.write_bytes(whole[: end - missing])
    for to_convert in (False, True):
        with pytest.raises(InputError, match=f"is not whole: it has {end - missing} bytes, and should have {end}"):
            open_headers(str(path), to_convert=to_convert)


@pytest.mark.parametrize(
    ("architecture", "kind", "said"),
    [("llama", "adapter", "is an adapter"), ("clip", "mmproj", "is an image projector"), ("clip", "", "projector")],
)
def test_what_is_no_language_model_is_called_by_its_name(tmp_path, architecture, kind, said):
    writer = GGUFWriter(tmp_path / "other.gguf", architecture)
    if kind:
        writer.add_type(kind)
    writer.add_tensor("a.weight", np.zeros((4, 4), dtype=np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for read in (open_headers, resolve_source):
        with pytest.raises(InputError, match=said) as caught:
            read(str(tmp_path / "other.gguf"))
        assert "config.json" not in str(caught.value)
