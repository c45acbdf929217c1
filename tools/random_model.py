"""Makes a random Gemma-3 with the widths of the 1B, fewer layers and words, for measurements.

    python tools/random_model.py FOLDER [--layers 14 --vocabulary 131072]

Its weights are bfloat16, and its tokenizer is the demo model's. The defaults give 527 million
parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_model import default_cache_dir, demo_model
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--vocabulary", type=int, default=131072)
    args = parser.parse_args()
    config = Gemma3TextConfig(
        vocab_size=args.vocabulary,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForCausalLM(config).save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(demo_model(default_cache_dir())).save_pretrained(args.folder)
    print(args.folder)


if __name__ == "__main__":
    main()
