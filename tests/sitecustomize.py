"""Python runs this at its start in every process that has tests/ in PYTHONPATH, as conftest.py sees to."""

import guard  # noqa: F401
