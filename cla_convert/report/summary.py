"""The end of a run in a few lines: what came of it, where it lies, what to do next."""

from ..run_folder import RunFolder
from .formats import number, ratio
from .run_folder import Json


def summary(report: Json, folder: RunFolder) -> str:
    """The verdict, the KV cache, perplexity on held-out text, three paths and the next command."""
    kv, model = report["kv"], folder.training.model if folder.training.model.exists() else folder.converted
    before, after = kv.get("bytes_per_token_before"), kv.get("bytes_per_token_after")
    lines = [f"verdict     {report['verdict']}"]
    if before and after:
        lines.append(f"KV cache    {before} -> {after} bytes per token, {ratio(before, after)}")
    if row := report["perplexity"].get("held_out"):
        points = [(name, row.get(name)) for name in ("before", "converted", "after")]
        found = ", ".join(f"{number(value)} {name}" for name, value in points if value is not None)
        lines.append(f"perplexity  {found} (held-out text)")
    lines += [f"model       {model}", f"report      {folder.pages['md']}", f"            {folder.pages['html']}"]
    return "\n".join([*lines, f"next        cla-convert verify {model}; cla-convert chat {model}"])
