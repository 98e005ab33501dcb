"""What is imported to load a model: the code of its own family."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cla_convert.conversion.convert import convert
from cla_convert.conversion.plan import make_plan
from cla_convert.models.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
LOADS = """
import json, sys
from pathlib import Path
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.training.rehearsal import skeleton

folder = Path(sys.argv[1])
load_tokenizer(folder)
names = [type(load_model(folder)).__name__, type(skeleton(json.loads((folder / "config.json").read_text()))).__name__]
print(json.dumps([names, [name for name in sys.modules if name.startswith("cla_convert.models.generated.modeling")]]))
"""


def test_a_model_is_loaded_without_the_code_of_other_families(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    convert(make_plan(source, sharing="cla2", init="mean"), source, tmp_path / "out")
    for folder, prefix, ours in ((tmp_path / "out", "Cla", ["llama"]), (tiny_llama, "", [])):
        done = subprocess.run(
            [sys.executable, "-c", LOADS, str(folder)], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        modules = [f"cla_convert.models.generated.modeling_cla_{name}" for name in ours]
        assert json.loads(done.stdout) == [[f"{prefix}LlamaForCausalLM"] * 2, modules], folder
