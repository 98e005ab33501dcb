"""How to get the same again: the command, seeds, versions, hashes and every setting."""

from collections.abc import Sequence

from ..content import Block, Details, Facts, Listing, Paragraph
from ..formats import changed, resumed, to_yaml
from ..invocations import invocations_of, table, versions_of
from ..run_folder import Json, RunFiles
from ..section import Material, Section, register
from ..text import Text, code


def collect(material: Material, report: Json) -> Json:
    """command, seeds and versions of the last invocation, all invocations, hashes, settings."""
    run = material.run
    command = run.environment.get("command")
    return {
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "versions": run.environment.get("versions") or _eval_versions(run),
        "invocations": invocations_of(run),
        "seeds": run.environment.get("seeds") or {"recipe": material.seed},
        "hashes": _hashes(run),
        "settings": run.recipe,
    }


def _eval_versions(run: RunFiles) -> Json:
    return next((result["versions"] for result in run.results.values() if result.get("versions")), {})


def _hashes(run: RunFiles) -> Json:
    """Hashes of the run, of the specification at each point, and of the models that were measured."""
    found: Json = dict(run.environment.get("hashes") or {})
    for point, result in run.results.items():
        found[f"specification_{point}"] = result.get("specification_hash")
        found[f"model_{point}"] = result.get("model_fingerprint")
    return found


def show(report: Json) -> Sequence[Block]:
    """The command, and what it depends on; where stages were made under different circumstances, under which."""
    source, invocations = report["source"], report["invocations"]
    versions = {name: " / ".join(found) for name, found in versions_of(invocations).items()} or report["versions"]
    facts: list[tuple[str, Text]] = [
        ("Seeds", ", ".join(f"{name} {seed}" for name, seed in report["seeds"].items())),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"),
    ]
    facts += [
        (f"Source {name}", code(source[name]))
        for name in ("revision", "sha256", "license", "quantization")
        if source.get(name)
    ]
    blocks: list[Block] = [Listing(report["command"] or "(the command was not recorded)")]
    if len(invocations) > 1:
        of_several = len({one.get("command") for one in invocations}) > 1
        told = "This run was not made in one go" + ("; the command above is the last one." if of_several else ".")
        blocks += [Paragraph(told), table(invocations)]
    train = report["train"] or {}
    blocks += [Paragraph(changed(change)) for change in train.get("changes") or []]
    blocks += [Paragraph(resumed(change)) for change in train.get("resumed") or []]
    blocks.append(Facts(facts))
    if hashes := {name: value for name, value in report["hashes"].items() if value}:
        blocks.append(
            Details("Hashes", [Facts([(name.replace("_", ", "), code(value)) for name, value in hashes.items()])])
        )
    return [*blocks, Details("Settings (recipe.yaml, resolved)", [Listing(to_yaml(report["settings"]))])]


register(Section("reproduce", place=95, title="How to reproduce", collect=collect, show=show))
