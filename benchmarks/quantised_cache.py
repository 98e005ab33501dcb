"""What an 8-bit KV cache costs the models of a run, on the texts that the run was measured on.

    python benchmarks/quantised_cache.py runs/mine --out quantised.json

transformers' quantised layers (fp8: 8-bit floating point with a scale a layer; hqq needs the package of that name)
under the source model and under the run's last one. Every row of the domain pack is read as a prompt of
`--prompt` tokens, whose own keys and values are used as they are, and its rest, which sees all of them quantised; so
the cost of a whole row is a little too small. KL is from the source with its plain cache. Only models whose layers all
have full attention: transformers has no such cache for sliding windows.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, Fp8QuantizedLayer, HQQQuantizedLayer

from cla_convert.environment import choose_dtype, pick_device
from cla_convert.evaluation.domains.pack import domain_rows
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.models.scoring import kl, log_probabilities, nll
from cla_convert.recipe_file import load_recipe
from cla_convert.run_folder import RunFolder
from cla_convert.stages.evaluate import measure_cache

Logits = Callable[[Tensor], Tensor]


class SaturatingFp8Layer(Fp8QuantizedLayer):
    """torch before 2.13 makes NaN of what is out of the range that the prompt fixed, later ones the limit."""

    def _quantize(self, tensor: Tensor, scale: Tensor | None = None) -> Any:
        if scale is not None:
            limit = scale * self.fp8_max
            tensor = tensor.float().clamp(-limit, limit)
        return super()._quantize(tensor, scale)


LAYERS: dict[str, Callable[[], Any]] = {"fp8": SaturatingFp8Layer, "hqq": lambda: HQQQuantizedLayer(nbits=8)}
"""What one layer keeps, in 8 bits."""


def main() -> None:
    """Measure and write a row a model: what is known of those that `cla-convert report` has of runs."""
    options = parse()
    folder = RunFolder(options.run)
    recipe = load_recipe(folder.recipe).recipe
    points = folder.points(recipe)
    source, last = points["before"], "after" if "after" in points else "converted"
    device = pick_device(recipe.device)
    dtype = choose_dtype(device)
    loaded = {point: load_model(points[point], dtype=dtype, device=device) for point in ("before", last)}
    rows = domain_rows(load_tokenizer(source), recipe.eval.domain_tokens, device)
    found = []
    for point, label in (("before", "source model"), (last, folder.path.name)):
        size = measure_cache(folder, point, points[point], device)
        scored = measured(uncached(loaded["before"]), cached(loaded[point], options.backend, options.prompt), rows)
        found.append(row(f"{label}, {options.backend} cache", size, scored))
    result = {"backend": options.backend, "prompt": options.prompt, "dtype": str(dtype), "device": device}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result | {"rows": found}, indent=2))
    print(json.dumps(found, indent=2))


def row(label: str, size: Any, scored: dict[str, Any]) -> dict[str, Any]:
    """Bytes are what the plain cache takes, at fewer bits; the scales, a number a layer, are not counted."""
    wide = 32 if getattr(size, "dtype", "float32") == "float32" else 16
    rises = [one["nll"] - one["source_nll"] for one in scored.values()]
    return {
        "label": label,
        "point": "cache",
        "kv_bytes_per_token": size.bytes_per_token * 8 / wide,
        "kl": sum(one["kl"] for one in scored.values()) / len(scored),
        "domains": math.expm1(sum(rises) / len(rises)),
        "comparable": True,
        "by_domain": scored,
    }


def uncached(model: Any) -> Logits:
    """Logits of a row read at once."""
    return lambda ids: model(input_ids=ids.to(model.device), use_cache=False).logits


def cached(model: Any, backend: str, prompt: int) -> Logits:
    """Logits of a row whose rest is read through a quantised cache."""

    def logits(ids: Tensor) -> Tensor:
        ids, layers = ids.to(model.device), model.config.num_hidden_layers
        cache = Cache(layers=[LAYERS[backend]() for _ in range(layers)])  # QuantizedCache, for layers that share, too
        first = min(prompt, ids.shape[1] // 2)
        parts = (ids[:, :first], ids[:, first:])
        return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1)

    return logits


@torch.no_grad()
def measured(source: Logits, model: Logits, domains: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """KL from the source and nats a token of both, by domain; a row at a time: a scale is of one sequence."""
    found = {}
    for name, rows in domains.items():
        sums, tokens = torch.zeros(3, dtype=torch.float64), rows.numel()
        for ids in rows.split(1):
            log_q, log_p = (log_probabilities(logits(ids)[0]) for logits in (source, model))
            nats = [nll(log[:-1], ids[0, 1:]) for log in (log_p, log_q)]
            sums += torch.stack([part.double().sum().cpu() for part in (kl(log_q, log_p), *nats)])
        divergence, own, the_source = (sums / torch.tensor([tokens, *2 * [tokens - len(rows)]])).tolist()
        assert math.isfinite(divergence), f"{name}: KL {divergence}, which is no result"
        found[name] = {"kl": divergence, "nll": own, "source_nll": the_source, "tokens": tokens}
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder with its models")
    parser.add_argument("--backend", choices=LAYERS, default="fp8")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a row before the cache is read")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
