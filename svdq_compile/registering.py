"""diffusers has no entry point for quantizers. So ours are put into its dictionaries as soon as both packages are
there, whichever was imported first, and diffusers is never imported for it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

log = logging.getLogger("svdq_compile")

AWAITED = "diffusers.quantizers.auto"


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: the module's own loader gets something to do after its work."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AWAITED:
            return None
        with suppress(ValueError):  # another thread has
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from . import diffusers_quantizer  # noqa: F401  (which registers itself)
    except Exception as error:  # whatever it is, `import diffusers` goes on
        log.warning("svdquant: this diffusers does not know SVDQuantConfig, which needs another version: %s", error)


def serve_diffusers() -> None:
    """Register now, or when diffusers' quantizers are imported."""
    if AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())
