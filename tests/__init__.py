"""The tests; what must be so before any of them loads a library of threads."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""As in the command: tests run beside each other, and threads that wait would take the cores from those that work."""
