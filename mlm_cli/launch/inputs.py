"""What a run needs from this machine, looked at before torch is imported or a rank is started.

The ranks look again, and theirs is what counts: they may see other disks. This look only makes a mistake cheap.
"""

from __future__ import annotations

from pathlib import Path

from mlm_cli import log
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.config.schema import Recipe
from mlm_cli.data.samples import open_training_data, with_sizes
from mlm_cli.data.tokenizer import load_tokenizer


def check_output(folder: str | None) -> None:
    """Raise unless the output folder is free.

    Raises:
        UsageError: another run holds it, or it cannot be written.
    """
    if folder is not None and Path(folder).is_dir():
        with RunFolder(folder).lock():
            pass


def check_pretraining_data(recipe: Recipe) -> None:
    """Raise unless tokenizer and data open and belong together.

    Raises:
        DataError: a tokenizer or a data set that does not load, made with another tokenizer, ids that the vocabulary
            does not have, too little text.
        UsageError: what the model's family cannot do with them; no vocabulary.
    """
    if recipe.output is not None and RunFolder(recipe.output).steps():
        return  # it has been trained on; a finished run does not even need it
    with log.muted():  # the ranks will say it
        tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
        model = with_sizes(recipe.model, recipe.data, tokenizer)
        open_training_data(recipe.data, model, tokenizer, seed=recipe.seed)
