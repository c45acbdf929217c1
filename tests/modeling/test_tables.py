"""What is known of a model's tables before it is loaded, and the data that is beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from scalora_dist.config.model import ModelArguments
from scalora_dist.data.collate import Collator
from scalora_dist.data.extent import Extent, extent, stored_extent
from scalora_dist.data.prompts import IGNORE
from scalora_dist.errors import UserError
from scalora_dist.modeling.tables import Tables, check_fits, read_tables, tables_of
from tests.support import tiny_models
from tests.support.refusals import one_sentence

POSITIONS = 16
VOCABULARY = 40
# The same sizes in the words of all families.
WORDS = {
    16: "hidden_size n_embd d_model emb_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim max_position_embeddings n_positions "
    "max_target_positions max_seq_len",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head "
    "n_heads num_heads attention_heads decoder_attention_heads num_key_value_heads num_kv_heads",
    24: "intermediate_size ffn_dim n_inner dff decoder_ffn_dim",
    4: "rotary_dim",
}
SIZES: dict[str, Any] = {word: size for size, words in WORDS.items() for word in words.split()}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SIZES |= {"decoder_start_token_id": 1, "is_decoder": True}
NEEDS: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "num_attention_heads": 4},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}
LIMITED = (
    *("gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt"),  # learned
    *("gptj", "codegen", "ctrl", "marian", "pegasus", "roformer", "whisper"),  # sines
    "mpt",  # ALiBi, made for one length
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot"),
    *("blenderbot-small", "electra", "ernie", "mbart", "megatron-bert", "mvp", "plbart"),
    *("rembert", "trocr", "xlm"),
    # These leave out the positions up to the id of the padding.
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    "xlm-roberta-xl",
)
UNLIMITED = (
    *("llama", "gpt_neox", "gemma3_text"),  # rotary
    *("bloom", "falcon", "xglm"),  # ALiBi, and sines that are computed again for a longer example
    *("mamba", "rwkv"),  # no positions
    *("apertus", "arcee", "bitnet", "cohere", "cohere2", "cpmant", "diffllama", "ernie4_5"),
    *("exaone4", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "glm", "glm4"),
    *("gpt_neox_japanese", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense"),
    *("jetmoe", "lfm2", "llama4_text", "minimax", "mistral", "mixtral", "modernbert-decoder"),
    *("moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi"),
    *("phi3", "phimoe", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)


def config_of(family: str, **others: Any) -> PreTrainedConfig:
    sizes = SIZES | NEEDS.get(family, {}) | others
    if family == "falcon":
        sizes |= {"alibi": True}
    return AutoConfig.for_model(family, **sizes)


def runs(model: PreTrainedModel, length: int) -> bool:
    ids = torch.randint(2, VOCABULARY, (1, length))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


def read(folder: Path, config: PreTrainedConfig) -> Tables:
    config.save_pretrained(folder)
    return read_tables(ModelArguments(model_name_or_path=str(folder)))


@pytest.mark.parametrize("family", [*LIMITED, *UNLIMITED])
def test_the_limit_is_where_running_fails(tmp_path: Path, family: str) -> None:
    """Of families of transformers that can be built with these sizes."""
    config = config_of(family)
    known = read(tmp_path, config)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert known == tables_of(model)
    assert known.rows >= known.logits == VOCABULARY
    assert (known.positions is not None) == (family in LIMITED)
    if known.positions is None:
        assert runs(model, 8 * POSITIONS)
    else:
        assert runs(model, known.positions) and not runs(model, known.positions + 1)


def test_positions_of_an_image_are_none_of_the_text(tmp_path: Path) -> None:
    """Gemma-3's vision tower has a table of patches, here with more rows than max_length."""
    text = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 28, "patch_size": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    assert read(tmp_path, config) == Tables(VOCABULARY, VOCABULARY, None)


def test_a_pad_id_that_a_model_cannot_be_built_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pad_token_id") as error:
        read(tmp_path, config_of("llama", pad_token_id=VOCABULARY))
    one_sentence(error)


def examples(*lists: list[int], labels: list[int] | None = None) -> Dataset:
    rows = [
        {"input_ids": ids, "labels": labels or ids, "place": f"d.jsonl, row {number}"}
        for number, ids in enumerate(lists, start=1)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            examples([2, 9], [3, 10, 4]),
            "d.jsonl, row 2: it has the token id 10 ()), but the model's embedding has 10 rows",
        ),
        (examples([2, 9], [3, -1]), "the token id -1, but"),
        (
            examples([2], [2] * 6),
            "row 2: it has 6 tokens, but the model has a table of 5 positions: set --max_l",
        ),
        (examples([2, 8], labels=[IGNORE, 8]), "the target 8 ('), but the model predicts 8 tokens"),
        (examples([2, 9999]), "the token id 9999, but"),
    ],
)
def test_what_is_beyond_a_table_is_refused(data: Dataset, says: str) -> None:
    with pytest.raises(UserError) as error:
        check_fits(Tables(10, 8, 5), data, tiny_models.byte_tokenizer())
    assert says in one_sentence(error)


def test_what_is_within_the_tables_is_taken() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    at_the_edge = examples([0, 9, 9, 9, 9], labels=[IGNORE, 0, 7, 7, 7])
    check_fits(Tables(10, 8, 5), at_the_edge, tokenizer)
    check_fits(Tables(10, 10, None), examples([9] * 1000), tokenizer)
    assert Tables(10, 8, 5).longest(7) == 5 == Tables(10, 8, None).longest(5)


def test_only_selected_examples_count() -> None:
    """Examples without a target are left out, and they may be the longest."""
    tokenizer, tables = tiny_models.byte_tokenizer(), Tables(10, 10, 3)
    data = examples([2, 3], [4] * 9, [], [30], [5, 1, 6])
    check_fits(tables, data.select([4, 0, 2]), tokenizer)
    for wrong in (1, 3):
        with pytest.raises(UserError):
            check_fits(tables, data.select([4, 0, wrong]), tokenizer)
    chosen = data.select([4, 2, 0])
    assert stored_extent(chosen, "input_ids") == Extent(longest=9, least=1, most=30)
    assert extent(chosen, "input_ids") == Extent(longest=3, least=1, most=6)


@pytest.mark.parametrize(
    ("pad", "eos", "rows", "padding"), [(0, 1, 2, 0), (5, 1, 5, 1), (5, 6, 5, 0), (5, 6, 6, 5)]
)
def test_the_padding_has_a_row(pad: int, eos: int, rows: int, padding: int) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([pad, eos])
    short, long = ({"input_ids": [3] * n, "labels": [3] * n} for n in (1, 3))
    batch = Collator(tokenizer, rows)([short, long])
    assert batch.input_ids[0].tolist() == [3, padding, padding]
