"""transformers' own command line with the CLA classes in it: `python -m cla_convert.transformers_cli serve MODEL`.

`transformers serve` looks the class of a model up in transformers by its name, finds none for a class that ships with
the model, and offers no place to plug one in. So this puts the classes where it looks, and hands over.
"""

import sys


def attach() -> None:
    """Make the CLA classes attributes of transformers, beside registering them with its Auto classes."""
    from .models.export import cla_classes, register
    from .models.families import FAMILIES

    register()
    library = sys.modules["transformers"]  # it replaces itself while it is imported
    for family in FAMILIES.values():
        model = cla_classes(family)["ForCausalLM"]
        setattr(library, model.__name__, model)


def main() -> None:
    """Run transformers' command line."""
    attach()
    from transformers.cli.transformers import main as transformers

    transformers()


if __name__ == "__main__":
    main()
