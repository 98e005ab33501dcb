"""A converted model's tokenizer gives the ids of its source's: every family, kinds of tokenizers, declared classes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.errors import InputError
from cla_convert.models import export
from cla_convert.models.checkpoint import Checkpoint
from cla_convert.models.export import load_tokenizer, register
from cla_convert.models.families import FAMILIES
from cla_convert.models.tokenization import check_as_recorded, difference, keep_tokenizer, segmentation_difference
from cla_convert.models.verify import verify_models
from cla_convert.training.teacher import check_teacher
from tests.tiny import save_tiny

SPECIALS = dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token"), "<|endoftext|>")
DECLARED = [
    None, "GPT2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizerFast",
    "CohereTokenizerFast", "NoSuchTokenizer",
]  # fmt: skip
TEXT = "2024 people, 19,790  tokens"


def byte_level(pre_tokenizer: Any, *, unused: int = 0) -> Tokenizer:
    merges = [("2", "0"), ("2", "4"), ("20", "2"), ("Ġ", "t"), ("Ġ", "Ġ"), ("Ċ", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    pieces += [f"unused{i}" for i in range(unused)]
    vocab = {"<|endoftext|>": 0} | {piece: i for i, piece in enumerate(pieces, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    return tokenizer


def threes(**options: Any) -> Tokenizer:
    """As Llama 3 and OLMo 2: three digits at a time."""
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Sequence([split, whole]), **options)


def gpt2() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def prefixed() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def digits() -> Tokenizer:
    """As StarCoder and Qwen: a digit at a time, after normalisation."""
    single, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = byte_level(pre_tokenizers.Sequence([single, bytes_]))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2: pieces with bytes to fall back on, and a first token."""
    pieces = ["<unk>", "<s>", "</s>", "<|endoftext|>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz0123456789", "▁t", "20", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("2", "0"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", "<|endoftext|>", *"▁abcdefghijklmnopqrstuvwxyz0123456789IMS.,", "▁t", "20"]
    tokenizer = Tokenizer(models.Unigram([(piece, -3 - i / 50) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


KINDS: list[Callable[[], Tokenizer]] = [threes, prefixed, digits, metaspace, unigram]


def write(folder: Path, model_type: str, tokenizer: Tokenizer, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**SPECIALS, **config}))
    model = {"model_type": model_type, "transformers_version": "4.50.0"}
    if model_type == "lfm2_moe":  # whose layers nothing tells by default
        model |= {"layer_types": ["full_attention"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def copied(source: Path, out: Path) -> Path:
    """The source's files beside the config.json of a converted model."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"model_type": f"cla_{config['model_type']}"}))
    return out


def ids(folder: Path, text: str = TEXT) -> list[int]:
    register()
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text).input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_tokenizer_and_declared_class_gives_the_ids_of_the_source(family: str, tmp_path: Path):
    """Two of five kinds for each family and class, so that every pair of a kind with either occurs."""
    for i, declared in enumerate(DECLARED):
        for kind in (KINDS[(i + shift + list(FAMILIES).index(family)) % len(KINDS)] for shift in (0, 1)):
            config = {"tokenizer_class": declared} if declared else {}
            source = write(tmp_path / "source", family, kind(), **config)
            out = copied(source, tmp_path / "out")
            keep_tokenizer(source, out)
            theirs = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            ours = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
            assert difference(theirs, ours) is None, (kind, declared)
            shutil.rmtree(source), shutil.rmtree(out)


@pytest.mark.parametrize("family", ["olmo2", "phi3", "mistral", "granite"])
def test_a_plain_copy_would_give_other_ids(family: str, tmp_path: Path):
    source = write(tmp_path / "source", family, threes(), tokenizer_class="GPT2Tokenizer")
    assert ids(copied(source, tmp_path / "out")) != ids(source)


def test_a_tokenizer_that_does_not_load_is_refused_before_work(tmp_path: Path):
    source = write(tmp_path / "source", "olmo2", threes(), tokenizer_class="GPT2Tokenizer")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        keep_tokenizer(source, copied(source, tmp_path / "out"))


def test_a_tokenizer_of_sentencepiece_alone_names_the_package_it_needs(tmp_path: Path, monkeypatch: Any):
    source, out = save_tiny("llama", tmp_path / "source"), tmp_path / "out"
    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, out)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for folder in (source, out):
        (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        load_tokenizer(folder)  # it is not asked for beside a tokenizer.json
        (folder / "tokenizer.json").unlink()
    for read in (lambda: load_tokenizer(source), lambda: verify_models([out])):
        with pytest.raises(InputError, match=r"tokenizer\.model needs the package sentencepiece") as refused:
            read()
        assert refused.value.fix == "pip install sentencepiece"
    (source / "tokenizer.model").write_bytes(b"IQ== 0\n")  # of tiktoken
    export.refuse_pieces(source)


def test_a_class_that_says_the_truth_keeps_the_bytes_of_its_file(tmp_path: Path):
    source = write(tmp_path / "source", "olmo2", threes(), tokenizer_class="TokenizersBackend")
    out = copied(source, tmp_path / "out")
    keep_tokenizer(source, out)
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_what_transformers_mends_by_model_type_is_mended_in_the_output_too(tmp_path: Path):
    """`fix_mistral_regex` only works beside a config.json of Mistral's, for vocabularies above 100,000."""
    tokenizer = threes(unused=100_000)
    source = write(tmp_path / "source", "mistral", tokenizer, fix_mistral_regex=True)
    out = copied(source, tmp_path / "out")
    assert ids(out) != ids(source)
    keep_tokenizer(source, out)
    assert ids(out) == ids(source)


def test_code_of_the_source_that_is_not_shipped_is_not_asked_for(tmp_path: Path):
    auto_map = {"AutoTokenizer": ["tokenization_x.X", None]}
    source = write(tmp_path / "source", "qwen2", gpt2(), tokenizer_class="Qwen2Tokenizer", auto_map=auto_map)
    out = copied(source, tmp_path / "out")
    keep_tokenizer(source, out)
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


@pytest.fixture
def models_(tmp_path: Path) -> tuple[Path, Path]:
    """A source whose declared class is wrong, and its conversion."""
    source, out = save_tiny("olmo2", tmp_path / "source", vocab_size=300), tmp_path / "out"
    threes().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **SPECIALS}))
    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing="cla2", init="mean"), checkpoint, out)
    return source, out


def test_a_conversion_keeps_the_ids_and_training_refuses_when_they_change(models_: tuple[Path, Path], distill: Any):
    source, out = models_
    assert ids(out) == ids(source)
    check_as_recorded(out)
    check_teacher(distill, out, source)

    shutil.copyfile(source / "tokenizer_config.json", out / "tokenizer_config.json")  # as it was before
    with pytest.raises(InputError, match="gives other ids"):
        check_as_recorded(out)
    with pytest.raises(InputError, match="cuts text otherwise"):
        check_teacher(distill, out, source)


def test_verify_compares_with_the_record_and_without_one_with_the_family(models_: tuple[Path, Path]):
    source, out = models_
    changed = shutil.copytree(out, out.with_name("changed"))
    shutil.copyfile(source / "tokenizer_config.json", changed / "tokenizer_config.json")
    unrecorded = {folder: shutil.copytree(folder, folder.with_name(f"{folder.name}-old")) for folder in (out, changed)}
    for folder in unrecorded.values():
        manifest = json.loads((folder / "cla_manifest.json").read_text())
        assert len(manifest.pop("tokenizer")["ids"]) == 64
        (folder / "cla_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="changed failed verification") as refused:
        verify_models([out, unrecorded[out], changed])
    assert "Failed: text becomes the tokens of the source (transformers" in refused.value.why
    with pytest.raises(InputError, match="changed-old failed verification"):
        verify_models([unrecorded[changed]])


@pytest.fixture
def distill() -> Any:
    from cla_convert.recipe import Train

    return Train(loss="distill", sequence_length=128)


def test_tokenizers_of_one_vocabulary_that_cut_alike_may_add_other_tokens(tmp_path: Path):
    plain = write(tmp_path / "plain", "llama", threes(), tokenizer_class="TokenizersBackend")
    tokenizer = threes()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with_first = write(tmp_path / "first", "llama", tokenizer, tokenizer_class="TokenizersBackend")
    one, other = load_tokenizer(plain), load_tokenizer(with_first)
    assert difference(one, other)
    assert segmentation_difference(one, other) is None
