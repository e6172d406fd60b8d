"""lopt: learned optimizers.

Everything here is a transformation of one function, `unroll`. Names are imported when they are
first used, so that the command line answers before JAX is loaded; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
