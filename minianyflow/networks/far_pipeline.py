"""AnyFlowFARPipeline whose chunks see no padded keys: an export holds this file as pipeline.py.

It needs diffusers alone. diffusers' own attention fills the keys of a chunk with zeros up to a multiple of 128, and the
softmax counts them; a network that was trained with minianyflow has never seen these.
"""

import torch
from diffusers import AnyFlowFARPipeline
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor, apply_rotary_emb
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class CachedAttention(AnyFlowCausalAttnProcessor):
    """As the class above where a cache is written; a chunk that reads it sees earlier chunks and itself, no more."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: object = None,
        rotary_emb: dict | None = None,
        kv_cache: dict | None = None,
        kv_cache_flag: dict | None = None,
    ) -> Tensor:
        """As diffusers' processor."""
        if attention_mask is not None:
            options = {"attention_mask": attention_mask, "rotary_emb": rotary_emb}
            return super().__call__(attn, hidden_states, kv_cache=kv_cache, kv_cache_flag=kv_cache_flag, **options)
        value = attn.to_v(hidden_states)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (
            part.to(value.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        past = [
            kv_cache[f"{kind}_cache"][:, :, :, : kv_cache_flag[f"num_cached_{kind}_tokens"]]
            for kind in ("compressed", "full")
        ]
        key, value = torch.cat([*past, torch.stack([key, value])], 3)
        query, key = apply_rotary_emb(query, rotary_emb["query"]), apply_rotary_emb(key, rotary_emb["key"])
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class UnpaddedFARPipeline(AnyFlowFARPipeline):
    """AnyFlowFARPipeline with CachedAttention in its transformer."""

    def __init__(
        self, tokenizer: object, text_encoder: nn.Module, transformer: nn.Module, vae: nn.Module, scheduler: object
    ):
        super().__init__(tokenizer, text_encoder, transformer, vae, scheduler)
        for block in transformer.blocks:
            block.attn1.set_processor(CachedAttention())
