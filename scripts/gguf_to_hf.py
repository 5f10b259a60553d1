"""Turn a llama-architecture GGUF model into a directory that vLLM loads.

    gguf_to_hf.py MODEL.gguf DIR

DIR gets config.json, generation_config.json, model.safetensors (bfloat16) and
the tokenizer with its chat template. transformers can read a GGUF itself, but
cannot save what it read, and vLLM no longer reads GGUF without a plug-in.

The weights come back from their quantised form, so this model is a little
worse than the one it was made from. For tests of serving that does not matter:
what counts is that every instance loads the same weights.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# GGUF's name of a tensor -> transformers' name, outside the blocks and inside one.
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# GGUF token types (llama.cpp's enum llama_token_type).
CONTROL, USER_DEFINED = 3, 4


class Metadata:
    """The key-value header of a GGUF file."""

    def __init__(self, reader):
        self.fields = reader.fields

    def get(self, key, default=None):
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key):
        value = self.get(key)
        if value is None:
            sys.exit(f"gguf_to_hf: the file has no {key}")
        return value


def hf_name(name):
    if name in TOP:
        return TOP[name]
    prefix, layer, part, suffix = name.split(".")
    if prefix != "blk" or suffix != "weight" or part not in BLOCK:
        sys.exit(f"gguf_to_hf: tensor {name} has no place in a llama model")
    return f"model.layers.{layer}.{BLOCK[part]}.weight"


def rope_halves(weight, heads):
    """Undo llama.cpp's reordering of the rotary rows of Q and K.

    GGUF stores each head's rows as pairs (x0, y0, x1, y1, ...); transformers
    rotates the first half against the second: (x0, x1, ..., y0, y1, ...).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert_weights(reader, meta):
    heads = {
        "attn_q": meta.need("llama.attention.head_count"),
        "attn_k": meta.need("llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        for part, count in heads.items():
            if f".{part}." in tensor.name:
                weight = rope_halves(weight, count)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return weights


def config(meta, weights):
    hidden = meta.need("llama.embedding_length")
    heads = meta.need("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.need("llama.feed_forward_length"),
        "num_hidden_layers": meta.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.need("llama.attention.head_count_kv"),
        "head_dim": meta.get("llama.rope.dimension_count", hidden // heads),
        "max_position_embeddings": meta.need("llama.context_length"),
        "rms_norm_eps": meta.need("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": False,
        "mlp_bias": False,
        **special_ids(meta),
    }


def special_ids(meta):
    return {
        "bos_token_id": meta.need("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.need("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


def tokenizer(meta, path):
    """The byte-level BPE tokenizer of SmolLM (llama.cpp's pre-tokenizer `smollm`).

    Built by hand: the pre-tokenizer is the one thing that a GGUF names instead
    of holding, and SmolLM's splits digits one by one, which plain GPT-2's does not.
    """
    if (kind := (meta.need("tokenizer.ggml.model"), meta.need("tokenizer.ggml.pre"))) != ("gpt2", "smollm"):
        sys.exit(f"gguf_to_hf: knows the tokenizer gpt2/smollm only, not {'/'.join(kind)}")
    tokens = meta.need("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in meta.need("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for kind, token in zip(meta.need("tokenizer.ggml.token_type"), tokens):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            (backend.add_special_tokens if kind == CONTROL else backend.add_tokens)([added])
    ids = special_ids(meta)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[ids["bos_token_id"]],
        eos_token=tokens[ids["eos_token_id"]],
        pad_token=None if ids["pad_token_id"] is None else tokens[ids["pad_token_id"]],
        unk_token=tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)],
        clean_up_tokenization_spaces=False,
        model_max_length=meta.need("llama.context_length"),
    )
    fast.chat_template = meta.need("tokenizer.chat_template")
    fast.save_pretrained(path)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(source, target):
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(source)
    meta = Metadata(reader)
    if (architecture := meta.need("general.architecture")) != "llama":
        sys.exit(f"gguf_to_hf: knows the architecture llama only, not {architecture}")
    weights = convert_weights(reader, meta)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # save_file makes it private to its owner
    write_json(target / "config.json", config(meta, weights))
    write_json(target / "generation_config.json", special_ids(meta))
    tokenizer(meta, target)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    print(f"gguf_to_hf: {len(weights)} tensors, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: gguf_to_hf.py MODEL.gguf DIR")
    main(sys.argv[1], sys.argv[2])
