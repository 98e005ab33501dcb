"""Convert a model, train it on a folder of text, and talk to it beside its source.

    python examples/convert_and_chat.py MODEL my-corpus/ runs/mine
    python examples/convert_and_chat.py MODEL my-corpus/ runs/mine train.tokens=1M convert.sharing=cla2

What is finished in runs/mine is not done again: the second time the conversation begins at once.
"""

import sys

from cla_convert import ClaError, RunFolder, check, convert, load_recipe, uptrain
from cla_convert.chat import Manner, Speaker, chat, lines_of
from cla_convert.environment import choose_dtype, pick_device
from cla_convert.recipes import find_recipe


def main(model: str, corpus: str, out: str, *settings: str) -> None:
    """Every stage in turn, then a conversation on stdin and stdout."""
    named = [f"source.model={model}", f"data.sources=[{{path: {corpus}}}]"]
    recipe = load_recipe(find_recipe("default"), [*named, *settings]).recipe
    folder = RunFolder(out)
    check(recipe, folder)  # what would fail after hours fails now

    converted = convert(recipe, folder)
    before, after = converted.kv_bytes_per_token.before, converted.kv_bytes_per_token.after
    print(f"KV cache: {before} -> {after} bytes a token")
    trained = uptrain(recipe, folder)
    print(f"trained on {trained.tokens} tokens, loss {trained.loss:.3f}: {folder.training.model}")

    device = pick_device(recipe.device)
    models = {"source": folder.source(recipe), "trained": folder.training.model}
    manner = Manner(max_new_tokens=100)
    chat(
        [Speaker.load(name, path, device=device, dtype=choose_dtype(device), manner=manner)
         for name, path in models.items()],
        lines_of(sys.stdin),
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except ClaError as error:
        sys.exit(str(error))
