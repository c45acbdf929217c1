"""Fine-tune a causal language model, on shards or on one device.

deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/zero3.json --config RECIPE.yaml
torchrun --nproc_per_node 2 launch/train.py --fsdp --config RECIPE.yaml
python launch/train.py --config RECIPE.yaml
"""

from scalora_dist.cli import main

if __name__ == "__main__":
    main()
