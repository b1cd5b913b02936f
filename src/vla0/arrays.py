"""numpy arrays out of a pickle, and nothing else: a file of somebody else's cannot run code here."""

import pickle
from collections.abc import Collection
from typing import IO, Any

from vla0.errors import InputError

_KNOWN = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_BUILDERS = ("_reconstruct", "scalar", "_frombuffer")  # of numpy's own modules, whose names changed with numpy 2


class _Arrays(pickle.Unpickler):
    also: Collection[tuple[str, str]] = ()

    def find_class(self, module: str, name: str) -> Any:
        own = module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
        if (module, name) in _KNOWN or (module, name) in self.also or (own and name in _BUILDERS):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def load_arrays(file: IO[bytes], where: str, also: Collection[tuple[str, str]] = ()) -> Any:
    """What a pickle of arrays, numbers, strings, lists and dicts holds. Raises InputError for any other, having run nothing.

    also: (module, name) of plain classes of data that are known too.
    """
    try:
        reader = _Arrays(file)
        reader.also = also
        return reader.load()
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = f"{type(error).__name__}: {error}"
        remedy = "fetch the file again from who made it"
        raise InputError(f"a pickle of numpy arrays alone in '{where}'", reason, remedy) from None
