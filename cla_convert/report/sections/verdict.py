"""The verdict: is what was lost within the margins that were set beforehand, measure by measure."""

from collections.abc import Sequence

from ...evaluation.gate import amount, reason_in_words
from ...evaluation.missing import told
from ...evaluation.verdict import NOT_COMPARED, NOT_JUDGED, NOT_MEASURED
from ..content import Block, Bullets, Paragraph
from ..formats import changes, number, plural, stage, titled
from ..run_folder import Json
from ..section import Material, Section, register
from ..text import Text, strong, tag
from .answers import silence

HEADINGS = {
    "within_margin": "Within the margins",
    "margin_broken": "Worse than the margins allow",
    "inconclusive": "Inconclusive",
    "not_measured": "Not evaluated",
}
TONES = {"within_margin": "good", "margin_broken": "bad", "inconclusive": "unsure", "not_measured": "unsure"}
_WORDS = {"within_margin": "within", "margin_broken": "worse", "inconclusive": "cannot tell"}
INCOMPLETE = "EVALUATION INCOMPLETE"
_OTHER_MODEL = "MEASURED ON ANOTHER MODEL than the one that is there now."
_NOT_BOTH = "the source model and the last one of the run were not both measured."
WORST_FIRST = ("margin_broken", "inconclusive", "within_margin")


def collect(material: Material, report: Json) -> Json:
    """verdict (a sentence or two to quote), status, judged, gate, margins; stale: points measured on other models.

    incomplete {point: parts}: what was not measured of it though it was of other points.
    """
    run, found = material.run, material.comparison
    judged = [row | {"text": _measure(row, report)} for row in found["judged"]]
    gate = found["gate"] | {"asked": (run.recipe.get("eval") or {}).get("gate", False)}
    stale = run.stale
    said = sentence(found["status"], judged, found["compared"])
    if run.incomplete:
        said = f"{INCOMPLETE}; not measured: {told(run.incomplete)}. {said}"
    if quiet := silence(report["silent"], run.last_point):
        said = f"{said} {quiet}"
    return {
        "verdict": f"{_OTHER_MODEL} {said}" if found["compared"] in stale else said,
        "stale": stale,
        "incomplete": run.incomplete,
        "status": found["status"],
        "compared": found["compared"],
        "judged": judged,
        "gate": gate | {"reasons": [one | {"text": reason_in_words(one)} for one in gate["reasons"]]},
        "margins": material.margins.as_dict(),
    }


def sentence(status: str, judged: list[Json], point: str | None) -> str:
    """`Worse than the margins allow, after uptraining. Worse: held-out perplexity ... Cannot tell: mean ...`"""
    if status == NOT_MEASURED:
        return f"{HEADINGS[status]}: {_NOT_BOTH}"
    parts = []
    for verdict in WORST_FIRST:
        if texts := [row["text"] for row in judged if row["verdict"] == verdict]:
            parts.append(f"{_WORDS[verdict].capitalize()}: {'; '.join(texts)}.")
    return f"{HEADINGS[status]}, {stage(point)}. {' '.join(parts)}"


def _measure(row: Json, report: Json) -> str:
    """`held-out perplexity 30.76 -> 44.22 (+43.7%, 95% CI +39.1% to +48.6%; margin 5%)`."""
    measure, scope = row["measure"], row["scope"]
    delta, *ends = _amounts(measure, [row["delta"], *(row["ci95"] or [])])
    interval = f"95% CI {ends[0].split()[0]} to {ends[1].split()[0]}" if ends else "no interval"
    margin = _margin(measure, row["margin"])
    if measure == "kl":
        return f"KL from the source on held-out text {delta} per token ({interval}; margin {margin})"
    if measure == "perplexity":
        numbers = report["perplexity"].get(scope) or {}
        last = numbers.get(report["compared_point"])
        levels = f"{number(numbers.get('before'))} -> {number(last)}"
        return f"{titled(scope)} perplexity {levels} ({delta}, {interval}; margin {margin})"
    if scope == "mean":
        mean = report["mean_accuracy"]
        what = f"mean accuracy over {plural(len(mean['tasks']), 'task')} ({plural(mean['n'], 'document')})"
        return f"{what} changed by {delta} ({interval}; margin {margin})"
    return f"{scope} {row['metric']} changed by {delta} ({interval}; margin {margin})"


def _amounts(measure: str, values: list[float | None]) -> list[str]:
    """A change and the ends of its interval, as in the tables: a rise to more than twice as a factor."""
    if measure == "perplexity" and values[0] is not None:
        return changes(values)
    return [amount(measure, value) for value in values]


def _margin(measure: str, value: float) -> str:
    if measure == "kl":
        return f"{value:g}"
    return f"{100 * value:g}{'%' if measure == 'perplexity' else ''}"


def show(report: Json) -> Sequence[Block]:
    """Every judged measure with its verdict, worst first, and the gate."""
    rows = sorted(report["judged"], key=lambda row: WORST_FIRST.index(row["verdict"]))
    items: list[Text] = [[tag(_WORDS[row["verdict"]], TONES[row["verdict"]]), " ", row["text"]] for row in rows]
    heading = HEADINGS[report["status"]] + (f", {stage(report['compared'])}" if report["compared"] else "")
    blocks: list[Block] = [Paragraph(strong(heading))]
    if report["incomplete"]:
        blocks.insert(0, Paragraph([strong(INCOMPLETE), f"; not measured: {told(report['incomplete'])}."]))
    if report["compared"] in report["stale"]:
        blocks.append(Paragraph(f"{_OTHER_MODEL} Evaluate it again."))
    if items:
        blocks.append(Bullets(items, "judged"))
    else:
        blocks.append(Paragraph(f"{_NOT_BOTH[0].upper()}{_NOT_BOTH[1:]}"))
    if quiet := silence(report["silent"], report["compared_point"]):
        blocks.append(Paragraph(quiet))
    return [*blocks, Paragraph(gate_line(report["gate"]))]


def gate_line(gate: Json) -> str:
    """What the quality gate found; what was judged stands above it."""
    open_ends = (NOT_COMPARED, NOT_JUDGED, NOT_MEASURED)
    absent = [reason["text"] for reason in gate["reasons"] if reason["code"] in open_ends]
    off = "" if gate["asked"] else " The recipe does not ask for it (eval.gate)."
    return f"Quality gate: {gate['state']}{' (' + '; '.join(absent) + ')' if absent else ''}.{off}"


register(
    Section(
        "verdict", place=5, collect=collect, show=show, needs=("accuracy", "perplexity", "answers"),
        style=lambda report: f"verdict {TONES[report['status']]}",
    )
)  # fmt: skip
