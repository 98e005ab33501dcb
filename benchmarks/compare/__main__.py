"""A comparison of many conversions in one command, which can be interrupted and goes on when repeated.

    python benchmarks/compare --out runs/compare                                      # all of it, as on one H100
    python benchmarks/compare --out runs/compare --minutes 25 --jobs 2                # what that time allows
    python benchmarks/compare --out runs/dry --size dry --only 'smollm2-*'            # proof that it runs, on a CPU
    python benchmarks/compare --out runs/compare --page                               # tables and plots alone

arms.yaml lists what is compared, in the order of worth; h100.yaml and dry.yaml say what it may cost. Every arm is a
`cla-convert run`, and results.md is made from what those leave.
"""

import argparse
import sys
from pathlib import Path

from arms import read_comparison
from page import write_page
from work import Place, run_all

from cla_convert.console import data, say
from cla_convert.errors import ClaError

HERE = Path(__file__).parent


def main() -> int:
    """Run, then write the page; 1 if an arm failed, 130 if something is left for the next time."""
    options = parse()
    size = HERE / f"{options.size}.yaml"
    try:
        comparison = read_comparison(
            options.arms,
            size if size.exists() else Path(options.size),
            models=dict(pair.split("=", 1) for pair in options.model),
            assignments=options.set,
            only=options.only,
        )
        place = Place(options.out)
        if options.page:
            states = {name: place.ended(arm) or "not run yet" for name, arm in comparison.arms.items()}
        else:
            states = run_all(comparison.arms, place, jobs=options.jobs, minutes=options.minutes)
        data(str(write_page(comparison, place, states)))
    except ClaError as error:
        say(f"error: {error}")
        return error.exit_code
    if options.page:
        return 0
    for name in (name for name, state in states.items() if state != "done"):
        say(f"{name}: {states[name]}")
    return 1 if "failed" in states.values() else 130 if set(states.values()) - {"done"} else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; what is there is kept")
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yaml", help="what is compared")
    parser.add_argument("--size", default="h100", help="h100, dry, or a file like them")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="arms by name; repeatable")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL", help="where a listed model is")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="a setting of every arm")
    parser.add_argument("--minutes", type=float, help="stop by then; the same command goes on")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--page", action="store_true", help="run nothing: tables and plots of what is there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
