"""Run transformers' own common model tests on the CLA classes.

    pip install parameterized
    pip download --no-deps --no-binary transformers transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    python benchmarks/transformers_model_tests.py transformers-5.23.0 [CASE ...]

CASE is a name of tests/tiny.py; by default all, at a minute or more each. The generation tests are not in the source
distribution of transformers; what stands in for them here is empty.
"""

import sys
import types
import unittest
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.models.auto.modeling_auto as auto

sys.path.insert(0, str(Path(__file__).parents[1]))

from cla_convert.conversion.sharing import sharing_map
from cla_convert.models.classes import cla_classes, register
from cla_convert.models.families import FAMILIES
from cla_convert.models.shape import shape_of
from tests.tiny import CASES, tiny_config

LEFT_OUT = {
    "test_generation_tester_mixin_inheritance": "asks for the generation tests, which are not distributed",
    "test_num_layers_is_small": "asks for two layers; sharing needs more",
    "test_training_gradient_checkpointing_use_reentrant_true": "refused, because its gradients are wrong",
}

OF_HYBRIDS = {"test_attention_outputs": "asks for attention in every layer; transformers' own hybrids replace it"}


def common_tests(folder: Path) -> Any:
    """The mixin of the unpacked source distribution, whose folder is a package beside our own `tests`."""
    for name, missing in {
        "exporters.test_export": "ExportTesterMixin",
        "generation.test_utils": "GenerationTesterMixin",
    }.items():
        module = types.ModuleType(f"common.{name}")
        setattr(module, missing, type(missing, (), {}))
        sys.modules[f"common.{name.split('.')[0]}"] = types.ModuleType(f"common.{name.split('.')[0]}")
        sys.modules[f"common.{name}"] = module
    package = types.ModuleType("common")
    package.__path__ = [str(folder / "tests")]
    sys.modules["common"] = package
    from common import test_modeling_common  # type: ignore[import-not-found]

    return test_modeling_common.ModelTesterMixin


class Tiny:
    """What the mixin asks of a model tester."""

    batch_size, seq_length, is_training, hidden_size = 3, 7, True, 32

    def __init__(self, case: str) -> None:
        source = tiny_config(case, initializer_range=0.02)
        settings = source.to_dict()
        sources = sharing_map("cla2-keep-ends", shape_of(settings).kinds)
        settings.pop("model_type")
        self.config = cla_classes(FAMILIES[CASES[case][0]])["Config"](**settings, kv_source_layers=sources)
        self.num_attention_heads, self.num_hidden_layers = source.num_attention_heads, source.num_hidden_layers

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(2, 258, (self.batch_size, self.seq_length))
        return type(self.config)(**self.config.to_dict()), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def suite(mixin: Any, case: str) -> unittest.TestSuite:
    """The tests of one case."""
    family = FAMILIES[CASES[case][0]]
    classes = cla_classes(family)
    auto.MODEL_MAPPING_NAMES[family.cla_type] = family.class_name("Model")
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.cla_type] = family.class_name("ForCausalLM")
    attributes = dict.fromkeys([*LEFT_OUT, *(OF_HYBRIDS if family.state else ())]) | {
        "all_model_classes": (classes["Model"], classes["ForCausalLM"]),
        "model_split_percents": [0.5, 0.6],
        "setUp": lambda self: setattr(self, "model_tester", Tiny(case)),
    }
    return unittest.defaultTestLoader.loadTestsFromTestCase(type(case, (mixin, unittest.TestCase), attributes))


if __name__ == "__main__":
    register()
    mixin = common_tests(Path(sys.argv[1]))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for case in sys.argv[2:] or CASES:
        result = unittest.TextTestRunner(verbosity=0, buffer=True).run(suite(mixin, case))
        failed = len(result.failures) + len(result.errors)
        skipped = len({getattr(test, "test_case", test).id() for test, _ in result.skipped})  # subtests count once
        rows.append(f"| {case} | {result.testsRun - skipped - failed} | {skipped} | {failed} |")
    print("\n".join(["| case | passed | skipped | failed |", "|---|---|---|---|", *rows]))
