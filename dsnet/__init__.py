"""Dynamic slimmable networks: supernets, gates, routing tables, grouped dynamic inference and
bundles.

`dsnet.load_bundle(path)` gives a classifier; everything else is imported from its own module.
Importing this package imports no torch, so that a command line can answer `--help` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsnet.deploy.bundle import Bundle, load_bundle

__version__ = "0.1.0"
"""Version of the distribution dsnet-orch, read by setup.py."""

__all__ = ["Bundle", "__version__", "load_bundle"]


def __getattr__(name: str) -> Any:
    """Import the names that need torch only when they are used (PEP 562)."""
    if name in __all__:
        from dsnet.deploy import bundle

        return getattr(bundle, name)
    raise AttributeError(f"module 'dsnet' has no attribute {name!r}")
