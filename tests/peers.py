"""Other houses' packages, as the tests take them: absent ones excuse a test, and none is compiled."""

import warnings
from types import ModuleType

import numba
import pytest


def imported(name: str) -> ModuleType:
    """Import a peer, or skip.

    Without the deprecation warnings of its own imports, and as plain Python: a thousand bars through the loops of vectorbt take
    seconds, compiling them takes more than a minute.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(numba.config, "DISABLE_JIT", True)
        module: ModuleType = pytest.importorskip(name, reason=f"no package {name} found")
    return module
