"""Before stage 1: find out in seconds what would otherwise fail after hours. Nothing is made here."""

from ..console import say
from ..environment import import_slowly, pick_device
from ..preflight import check_evaluation, check_lengths, check_packing
from ..recipe import Recipe
from ..run_folder import RunFolder
from .disk import disk_of
from .plan import bound
from .text import say_untaught


def check(recipe: Recipe, folder: RunFolder, *, anew: bool = False) -> None:
    """Check this transformers, tasks, texts, tokenizer, lengths, teacher, data sources and disk.

    `anew`: what is finished in the folder will be made again.

    Raises:
        UsageError, InputError: for the first thing that will not do.
    """
    say("checking model, tasks, text and disk before the work begins ...")
    import_slowly("torch", "transformers", "lm_eval")
    from ..conversion.supported import check_convertible
    from ..evaluation.backend import check_backend
    from ..evaluation.harness import check_tasks
    from ..evaluation.texts import check_texts
    from ..models.checkpoint import Checkpoint
    from ..models.export import load_tokenizer
    from ..models.self_test import check_interface
    from ..training.data import check_data
    from ..training.schedule import check_steps

    source, device = folder.source(recipe), pick_device(recipe.device)
    checkpoint = Checkpoint.open(source)
    config = checkpoint.config
    check_interface(config.get("model_type", ""))
    check_convertible(checkpoint)
    check_backend(recipe.eval, device)
    check_tasks(recipe.eval, source, recipe.seed)
    check_texts(recipe.eval.perplexity)
    check_evaluation(source)
    check_lengths(recipe, config)
    check_packing(recipe, config)
    check_steps(recipe.train)
    _check_training(recipe, folder)
    tokenizer = load_tokenizer(source)
    say_untaught(recipe, tokenizer)
    check_data(recipe, tokenizer, source, device)
    least_shared = bound(recipe, folder, anew=anew)  # the plan itself may take minutes of measuring
    disk_of(recipe, folder, least_shared, anew=anew).check(folder.path)


def _check_training(recipe: Recipe, folder: RunFolder) -> None:
    from ..training.layout import shards_of
    from ..training.parallel import check_team
    from ..training.teacher import check_teacher
    from ..training.trackers import check_trackers

    if recipe.train.tokens:
        if recipe.train.processes > 1:
            check_team(pick_device(recipe.device), recipe.train.processes)
            shards_of(recipe.train.shard_degree, recipe.train.processes, recipe.train.processes)
        check_trackers(recipe.train.log_to)
        check_teacher(recipe.train, folder.source(recipe), folder.teacher(recipe))
