"""Wan transformers of diffusers as functions u(z, t, r, prompt), and the text encoder that embeds the prompts.

A tiny transformer for two CPU cores and Wan2.1 itself are one class of different sizes; video.py has it in plain torch.
Shapes:
    z, u    (B, F, C, H, W)     latents, frames first as in diffusers' AnyFlow
    t, r    (B,) or (B, F)      one time per sample, or one per frame, in [0, 1]
    prompt  (B, L, D)           embeddings of the text's L tokens; rows of padding are zero
    known   (B, F)              which frames are known: see known_frames.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from minianyflow.networks.known_frames import Known, keep_known, known_times
from minianyflow.networks.video import TIMESTEPS, Latents, Prompt, VideoTimes, to_timesteps
from minianyflow.support.errors import InputError

TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 16}
TINY |= {"freq_dim": 64, "ffn_dim": 256, "num_layers": 4, "rope_max_seq_len": 64}
TINY_TIMESTEPS = 5.0  # tiny ones take 0 to 5: docs/video.md says what Wan's 160 turns between 0 and 1 do to du/dt
PROMPT_LENGTH = 4  # tokens; pass it to a pipeline as max_sequence_length: attention sees padding, in Wan too
WORDS = ("one", "two", "ball", "balls", "zero", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS += ("moving", "left", "right", "up", "down")  # more than blobs need: other toys use the same encoder


class WanNetwork(nn.Module):
    """The average velocity u(z, t, r, prompt) of an AnyFlowTransformer3DModel of any size.

    timesteps: the number that time 1 becomes for the transformer, 1000 in Wan; see TINY_TIMESTEPS.
    """

    def __init__(self, transformer: nn.Module, timesteps: float = TIMESTEPS):
        super().__init__()
        self.transformer, self.timesteps = transformer, timesteps

    def forward(self, z: Latents, t: VideoTimes, r: VideoTimes, prompt: Prompt, known: Known | None = None) -> Latents:
        """The average velocity of z from t down to r.

        Raises InputError for latents with other channels than the transformer's, or that patches do not divide.
        """
        check_latents(z, self.transformer.config)
        t, r = known_times(known, *(to_timesteps(time, z, self.timesteps) for time in (t, r)))
        states, prompt = to_compute_dtype(self.transformer, z, prompt)
        return keep_known(known, self.transformer(states, t, r, prompt, return_dict=False)[0].to(z.dtype))


class Autocast(nn.Module):
    """A network with float32 weights that computes in bfloat16, as average, teacher or sampler alike."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @property
    def transformer(self) -> nn.Module:
        """The transformer of the network."""
        return self.network.transformer

    def forward(self, z: Latents, *arguments: Tensor | None, **condition: Any) -> Tensor | tuple:
        """The network's output; states have the dtype of z."""
        with torch.autocast(z.device.type, torch.bfloat16):
            return self.network(z, *arguments, **condition)


def to_compute_dtype(transformer: nn.Module, *tensors: Tensor | None) -> list[Tensor | None]:
    """States and prompts in the dtype that the transformer computes in; None stays None. Times stay in float32."""
    dtype = transformer.patch_embedding.weight.dtype
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def check_latents(z: Latents, config: dict) -> None:
    """Raise InputError unless z is (B, F, C, H, W) with the channels and a size that the patches divide."""
    if z.ndim != 5 or z.shape[2] != config.in_channels:
        raise InputError(f"latents {tuple(z.shape)}; expected (B, F, {config.in_channels}, H, W)")
    _, high, wide = config.patch_size
    if z.shape[3] % high or z.shape[4] % wide:
        raise InputError(f"latents of {z.shape[3]} x {z.shape[4]}; expected a size that patches {high} x {wide} divide")


def tiny_transformer(seed: int = 0, **changes: object) -> AnyFlowTransformer3DModel:
    """A fresh transformer of the size in TINY; its target-time embedder starts as a copy of its time embedder."""
    torch.manual_seed(seed)
    transformer = AnyFlowTransformer3DModel(**TINY | changes)
    copy_time_embedder(transformer)
    return transformer


@torch.no_grad()
def copy_time_embedder(transformer: nn.Module) -> None:
    """Make the target-time embedder a copy of the time embedder: at r = t the network is then Wan exactly."""
    embedder = transformer.condition_embedder
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())


class TextEncoder(nn.Module):
    """A word-level tokenizer and a one-layer UMT5 with random, frozen weights: enough of a text encoder for toys."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
        size = {"d_model": TINY["text_dim"], "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}
        self.encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), dropout_rate=0.0, **size)).eval()
        self.requires_grad_(False)

    def forward(self, prompts: Sequence[str]) -> Prompt:
        """Embeddings (B, PROMPT_LENGTH, D) of a list of texts; "" is the null prompt.

        Raises InputError for a word that the tokenizer does not know, a text that is too long, or what is no list.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts {prompts!r}; expected a list of texts, such as ['one ball']")
        for prompt in prompts:
            unknown = [word for word in prompt.split() if word not in WORDS]
            if unknown or len(prompt.split()) >= PROMPT_LENGTH:
                why = f"the word {unknown[0]!r} is not known" if unknown else f"{len(prompt.split())} words"
                expected = f"at most {PROMPT_LENGTH - 1} of the words {', '.join(WORDS)}"
                raise InputError(f"prompt {prompt!r}: {why}; expected {expected}")
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt")
        mask = tokens.attention_mask
        with torch.no_grad():
            return self.encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
