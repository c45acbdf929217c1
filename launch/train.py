"""Fine-tune a causal language model, on shards or on one device.

deepspeed --num_gpus 2 launch/train.py --ds_config zero3 --config RECIPE.yaml
torchrun --nproc_per_node 2 launch/train.py --fsdp --config RECIPE.yaml
python launch/train.py --config RECIPE.yaml
"""

import os
import sys

try:
    from scalora_dist.cli import main
except ModuleNotFoundError as error:
    if os.environ.get("RANK", "0") == "0":
        print(
            f"error: {error.name}: not installed for {sys.executable}; run `make setup` and "
            "`. .venv/bin/activate`, or follow docs/install.md",
            file=sys.stderr,
        )
    sys.exit(2)

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
