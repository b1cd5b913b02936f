"""What other libraries say that helps nobody who uses this one."""

import importlib.util
import logging
import os
import warnings


def hush() -> None:
    """Silences what libraries say of themselves as they are imported, here and in processes that
    are started from here.
    """
    # of torchao and robosuite, wherever bytecode is not kept
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::SyntaxWarning")
    # of a model that has no name
    warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
    # bitsandbytes, which peft imports wherever it is installed, asks for one more package: for
    # speed on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # of times of files, when checkpoints make room
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


def quiet() -> None:
    """No progress bars of other libraries for what takes a moment; the Trainer's own stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
