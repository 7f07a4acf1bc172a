"""What a phase trains for: a sample becomes inputs, labelled positions and an attention kind. Pure numpy.

    base.py          the contract of an objective, `OBJECTIVES`, all of them by name, and their micro-batches
    clm.py, mlm.py, mntp.py, mdlm.py, alternate.py, mixture.py
                     one file an objective: a file put beside these is found by itself
    masking.py       what those that mask have in common; composite.py: those that are made of others
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
