"""What a server needs and what it is refused, without a server: names of layers, pipeline stages, versions, imports."""

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cla_convert.errors import InputError
from cla_convert.models.families import FAMILIES
from cla_convert.serving import versions
from cla_convert.serving.sharing import (
    check_cache_dtype,
    check_stages,
    copies_of_heads,
    gain,
    layer_of,
    owner_name,
    windows_of,
)
from cla_convert.serving.versions import check_family, check_vllm

ROOT = Path(__file__).parents[2]
OF_CONVERSION = ("lm_eval", "datasets", "matplotlib", "scipy", "pyarrow", "gguf", "accelerate", "pydantic")


@pytest.mark.parametrize(
    ("name", "owner"),
    [("model.layers.13.self_attn.attn", "model.layers.3.self_attn.attn"), ("13.attn", "3.attn"),
     ("model.h.13.attn.attn", "model.h.3.attn.attn"), ("transformer.h.13", "transformer.h.3")],
)  # fmt: skip
def test_every_way_of_naming_layers(name: str, owner: str):
    assert owner_name(name, 13, 3) == owner
    assert layer_of(name) == 13


@pytest.mark.parametrize(
    "name", ["model.layers.attn", "model.layers.13.experts.2.attn", "model.layers13.attn", "3.attn"]
)
def test_names_that_do_not_tell_the_owner_are_errors(name: str):
    with pytest.raises(InputError, match="called"):
        owner_name(name, 13, 3)


def test_a_layer_that_would_share_with_itself_is_an_error():
    with pytest.raises(InputError, match="itself"):
        owner_name("model.layers.3.self_attn.attn", 3, 3)


def test_the_window_of_a_layer_is_that_of_its_kind():
    """Not that of config.json, which may name one that no layer has."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32, "sliding_window": 8}
    assert windows_of(sizes | {"model_type": "cla_mistral"}) == [8] * 4
    assert windows_of(sizes | {"model_type": "cla_llama"}) == [None] * 4
    assert windows_of(sizes | {"model_type": "cla_gemma2"}) == [8, None] * 2
    assert windows_of(sizes | {"model_type": "cla_vaultgemma", "layer_types": ["full_attention"] * 4}) == [None] * 4


def test_stages_may_begin_only_where_no_sharing_is_cut():
    sources = [0, 1, 1, 3, 3, 5]
    for bounds in ([0, 6], [0, 3, 6], [0, 1, 3, 5, 6]):
        check_stages(sources, bounds)
    with pytest.raises(InputError, match=r"layers 2 to 5 lacks layer 1, .* layer 2 reads(.|\n)*layers 1, 3, 5: name"):
        check_stages(sources, [0, 2, 6])
    with pytest.raises(InputError, match="no stage may begin"):
        check_stages([0, 0, 0], [0, 1, 3])


def test_a_family_that_a_version_does_not_run_is_refused_there():
    with pytest.raises(InputError, match=r"vLLM 0.32.1\+cpu does not run MiniMax M2"):
        check_family(FAMILIES["minimax_m2"], "0.32.1+cpu")


def test_a_family_that_nobody_has_run_under_a_version_is_warned_of():
    assert check_family(FAMILIES["llama"], "0.32.0+cpu") is None
    warning = check_family(FAMILIES["llama"], "0.30.1")
    assert warning and "Llama was not tested under vLLM 0.30, it was under 0.26 and 0.32" in warning
    warning = check_family(FAMILIES["minimax_m2"], "0.30.1")
    assert warning and "not tested under vLLM 0.30, nor under another" in warning


def test_a_cache_with_scales_by_layer_is_refused():
    for dtype in ("auto", "bfloat16", "fp8"):
        check_cache_dtype(dtype)
    for dtype in ("fp8_per_token_head", "turboquant_4bit_nc", "nvfp4"):
        with pytest.raises(InputError, match=f"{dtype} does not fit"):
            check_cache_dtype(dtype)


def test_formats_of_single_layers_are_refused():
    check_cache_dtype("fp8", ["sliding_window"])
    with pytest.raises(InputError, match="skip-layers 2 3 does not fit"):
        check_cache_dtype("fp8", ["2", "sliding_window", "3"])


def test_heads_and_processes():
    pairs = [(8, 1), (8, 8), (8, 2), (2, 8), (1, 4)]
    assert [copies_of_heads(heads, processes) for heads, processes in pairs] == [1, 1, 1, 4, 4]
    with pytest.raises(InputError, match="3 KV heads cannot be spread over 2"):
        copies_of_heads(3, 2)


def test_what_is_gained_counts_layers_and_heads():
    assert gain(30, 16, 3, 3, 256) == (
        "16 of 30 layers keep keys and values, the others read theirs; 12,288 bytes a token: the same memory holds "
        "1.88x the tokens."
    )
    assert gain(30, 16, 1, 3, 256) == (
        "16 of 30 layers keep keys and values, the others read theirs; KV heads: 1 instead of 3; 4,096 bytes a token: "
        "the same memory holds 5.62x the tokens."
    )


@pytest.mark.parametrize(
    ("found", "ok"),
    [("0.26.0", True), ("0.33.1", True), ("0.32.0+cpu", True), ("0.25.1", False), ("0.34.0", False), ("1.0.0", False),
     ("dev", False), ("0.33rc1.dev2", False)],
)  # fmt: skip
def test_versions_that_are_not_known_are_refused(found: str, ok: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "version", lambda name: found)
    if ok:
        assert check_vllm() == found
    else:
        with pytest.raises(InputError, match=rf"vLLM {found.split('+')[0]}.* cannot(.|\n)*0\.26 to 0\.33"):
            check_vllm()


def test_the_build_for_cpus_has_another_name(monkeypatch: pytest.MonkeyPatch):
    def only_cpu(name: str) -> str:
        if name == "vllm":
            raise PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(versions, "version", only_cpu)
    assert check_vllm() == "0.32.0"


def names_of(requirements: list[str]) -> set[str]:
    return {requirement.split("[")[0].split(">")[0].split("=")[0].strip() for requirement in requirements}


def test_a_server_installs_little():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not names_of(project["dependencies"]) & {"lm-eval", "datasets", "matplotlib", "scipy", "pyarrow", "gguf"}
    extras = project["optional-dependencies"]
    assert {"lm-eval", "datasets", "matplotlib"} <= names_of(extras["convert"])
    assert names_of(extras["vllm"]) == {"vllm"}
    assert project["entry-points"]["vllm.general_plugins"] == {"cla_convert": "cla_convert.serving.plugin:register"}


def without_the_packages_of_conversion(code: str) -> subprocess.CompletedProcess:
    block = f"import sys; sys.modules.update(dict.fromkeys({OF_CONVERSION!r}))\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)


def test_serving_and_loading_need_nothing_of_conversion(tiny_llama: Path):
    done = without_the_packages_of_conversion(
        "import cla_convert.serving.plugin, cla_convert.serving.sharing, cla_convert.serving.versions\n"
        "from pathlib import Path\n"
        "from cla_convert.models.export import load_model\n"
        f"print(type(load_model(Path({str(tiny_llama)!r}))).__name__)"
    )
    assert done.stdout == "LlamaForCausalLM\n", done.stderr


def test_conversion_says_what_it_lacks(tiny_llama: Path, tmp_path: Path):
    done = without_the_packages_of_conversion(
        f"sys.argv = ['cla-convert', 'convert', {str(tiny_llama)!r}, {str(tmp_path / 'out')!r}]\n"
        "from cla_convert.cli import main\nmain()"
    )
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "pip install 'cla-convert[convert]'" in done.stderr


def test_the_table_of_the_documentation_is_what_the_script_prints():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/kv_capacity.py"], capture_output=True, text=True)
    table = done.stdout.strip()
    assert table.startswith("| shape, bfloat16 |") and table in (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert "| Llama 3 8B | `cla2` | 16 of 32 | 65,536 | 1,220,703 | 149 | 119 |" in table
