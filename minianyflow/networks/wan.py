"""Wan transformers of diffusers as functions u(z, t, r, prompt), and the text encoder that makes the prompts.

A tiny transformer for two CPU cores and Wan2.1 itself are the same class with other numbers. Shapes:
    z, u    (B, F, C, H, W)     latents, frames first as diffusers' AnyFlow has them
    t, r    (B,) or (B, F)      a time for every sample, or for every frame, in [0, 1]
    prompt  (B, L, D)           embeddings, rows beyond the end of the text zero
"""

import torch
from diffusers import AnyFlowTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from minianyflow.support.errors import InputError

TIMESTEPS = 1000.0  # Wan counts time from 0 to 1000
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 4,
    "rope_max_seq_len": 64,
}
TINY_TIMESTEPS = 5.0  # and tiny ones to 5: docs/video.md says what Wan's 160 turns between 0 and 1 do to du/dt
PROMPT_LENGTH = 4  # tokens; pass it as max_sequence_length to a pipeline: padding is seen, in Wan too
WORDS = (  # more than blobs need: another toy can be prompted by the same encoder
    *("one", "two", "ball", "balls"),
    *("zero", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("moving", "left", "right", "up", "down"),
)


class WanNetwork(nn.Module):
    """The average velocity u(z, t, r, prompt) of an AnyFlowTransformer3DModel, whatever its size.

    timesteps: what time 1 is counted as, 1000 in Wan; see TINY_TIMESTEPS.
    """

    def __init__(self, transformer, timesteps=TIMESTEPS):
        super().__init__()
        self.transformer, self.timesteps = transformer, timesteps

    def forward(self, z, t, r, prompt):
        """z (B, F, C, H, W), t and r (B,) or (B, F), prompt (B, L, D); returns the shape of z.

        Raises InputError for latents that patches do not divide, or other than the transformer's channels.
        """
        check_latents(z, self.transformer.config)
        t, r = (count_time(each, z, self.timesteps) for each in (t, r))
        inside = in_dtype(self.transformer, z, prompt)
        return self.transformer(inside[0], t, r, inside[1], return_dict=False)[0].to(z.dtype)


class Autocast(nn.Module):
    """A network with float32 weights that computes in bfloat16, whoever calls it: an average, a teacher, a sampler."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    @property
    def transformer(self):
        """The network's."""
        return self.network.transformer

    def forward(self, z, *arguments, **condition):
        """What the network returns; states in the dtype of z."""
        with torch.autocast(z.device.type, torch.bfloat16):
            return self.network(z, *arguments, **condition)


def in_dtype(transformer, *tensors):
    """States and prompts in what the transformer computes in; None stays None. Times stay in float32."""
    dtype = transformer.patch_embedding.weight.dtype
    return [each if each is None else each.to(dtype) for each in tensors]


def count_time(t, z, timesteps=TIMESTEPS):
    """Times (B,) or (B, F) in [0, 1] counted to `timesteps`, one a frame: (B, F), float32."""
    if t.shape not in (z.shape[:1], z.shape[:2]):
        raise InputError(f"times {tuple(t.shape)} for latents {tuple(z.shape)}; expected (B,) or (B, F)")
    return timesteps * (t[:, None] if t.ndim == 1 else t).float().expand(z.shape[:2])


def check_latents(z, config):
    """Raise InputError unless z is (B, F, C, H, W) with the channels and a size that the patches divide."""
    if z.ndim != 5 or z.shape[2] != config.in_channels:
        raise InputError(f"latents {tuple(z.shape)}; expected (B, F, {config.in_channels}, H, W)")
    _, high, wide = config.patch_size
    if z.shape[3] % high or z.shape[4] % wide:
        raise InputError(f"latents of {z.shape[3]} x {z.shape[4]}; expected a size that patches {high} x {wide} divide")


def tiny_transformer(seed=0, **changes):
    """A fresh transformer of the size in TINY; the embedder of the target time starts as a copy of the other."""
    torch.manual_seed(seed)
    transformer = AnyFlowTransformer3DModel(**TINY | changes)
    copy_time_embedder(transformer)
    return transformer


@torch.no_grad()
def copy_time_embedder(transformer):
    """Make the target-time embedder a copy of the time embedder: at r = t the network is then Wan exactly."""
    embedder = transformer.condition_embedder
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())


class TextEncoder(nn.Module):
    """A word-level tokenizer and a one-layer UMT5 that nothing trains: as much of a text encoder as toys need."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        size = {"d_model": TINY["text_dim"], "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}
        self.encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), dropout_rate=0.0, **size)).eval()
        self.requires_grad_(False)

    def forward(self, prompts):
        """Embeddings (B, PROMPT_LENGTH, D) of a list of texts; "" is the null prompt.

        Raises InputError for a word that the tokenizer does not know, a text that is too long, and no list of texts.
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
