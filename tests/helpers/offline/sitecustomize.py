"""Python imports this module when it starts, if PYTHONPATH has this folder."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import fresh_machine

fresh_machine.begin()

# Run the machine's own sitecustomize too, which this one hides.
spec = PathFinder.find_spec(__name__, [path for path in sys.path if path != str(fresh_machine.HERE)])
if spec is not None and spec.loader is not None:
    module = module_from_spec(spec)
    sys.modules[__name__] = module
    spec.loader.exec_module(module)
