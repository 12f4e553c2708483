"""Makes it an error, in every Python process that the tests start, that `--device auto` decides by accident.

A machine with a GPU would give another answer there than one without. A test names its device, or it is about `auto`
and says so: `@pytest.mark.auto`. conftest.py loads this in pytest itself, and sitecustomize.py in its children.
"""

import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

UTILS = Path(__file__).resolve().parents[1] / "utils.py"
MEANT = "TESTS_MEAN_AUTO"  # in the environment, so that a test's children know it too


class Loader(SourceFileLoader):
    """utils.py, with a `pick_device` that refuses `auto`."""

    def exec_module(self, module):
        super().exec_module(module)
        pick = module.pick_device

        def pick_device(name):
            if name == "auto" and MEANT not in os.environ:
                raise AssertionError("a test lets `--device auto` decide: name a device, or mark it `auto`")
            return pick(name)

        module.pick_device = pick_device


class Finder:
    """Finds utils.py as it is always found, for the loader above."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name == "utils" else None
        if spec and spec.origin and Path(spec.origin).resolve() == UTILS:
            spec.loader = Loader(name, spec.origin)
            return spec
        return None


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)
