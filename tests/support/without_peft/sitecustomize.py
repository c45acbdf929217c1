"""On the path of launched runs that need neither library: transformers imports PEFT wherever it is
installed, and PEFT imports bitsandbytes. Without them a rank starts in two thirds of the time."""

import sys

sys.modules["peft"] = sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
