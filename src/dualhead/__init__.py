"""Recurrent PPO: agents that remember, decide on several things at once and internalise norms."""

from importlib.metadata import version

import lazy_loader

__version__ = version("dualhead")
# Public names are listed in __init__.pyi. torch is imported with the first name that needs it, not with dualhead.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
