from typing import Any

resample_op: Any = None
