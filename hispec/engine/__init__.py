"""Engines run the cached passes of a model as compiled graphs."""

import sys

# With this package `import openvino` reports to its maker's servers; without it, it does not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
