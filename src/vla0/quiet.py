"""Silences messages of other libraries that do not help a user of vla0."""

import importlib.util
import logging
import os
import warnings


def hush() -> None:
    """Silence messages that libraries write when they are imported, also in child processes."""
    # of torchao and robosuite, whenever they are compiled because no bytecode is kept
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::SyntaxWarning")
    # of peft, for a model without a name
    warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
    # bitsandbytes, which peft imports if it is installed, asks for one more package, for speed on a
    # CPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # of the Trainer, about the times of files when old checkpoints are removed
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


def quiet() -> None:
    """Hide progress bars of other libraries for short tasks; the Trainer's own bar stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
