"""Wan from a folder: a tiny one in its layout, loaded as stock Wan is, into two times, with nothing lost unseen."""

import json
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from minianyflow.networks.causal import CausalNetwork, causal_from
from minianyflow.networks.lora_roles import Adapter, add_role
from minianyflow.networks.pipelines import load_lora
from minianyflow.networks.wan import WanNetwork
from minianyflow.support.cli import run
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.wan.commands import make_tiny_wan as command
from minianyflow.wan.data.captions import read_captions
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.folders import (
    TINY_LENGTH,
    decode_latents,
    encode_prompts,
    encode_video,
    load_parts,
    load_transformer,
    make_tiny_wan,
    moving_shapes,
)
from minianyflow.wan.sources import find_source
from tests.refused import refused

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CAPTIONS = ["a red disc moves left", "A cat &amp; a  dog —\n猫", ""]
T = torch.tensor([0.9, 0.3])


@pytest.fixture(scope="module")
def stock(tiny):
    pipeline = WanPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copied(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture(scope="module")
def batch(tiny):
    return LatentSet(tiny / "latents").draw(0, 2)


def rewrite(path, change):
    """A weight file with its tensors changed."""
    path.write_bytes(path.read_bytes())  # a file of our own, not the cache's
    save_file(change(load_file(path)), path, {"format": "pt"})


def change_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The tiny Wan


@pytest.mark.slow
def test_stock_diffusers_samples_it(stock):
    """Wan2.1's layout, sizes of latents and scheduler: a WanPipeline, and a video comes out."""
    assert isinstance(stock.transformer, WanTransformer3DModel)
    assert stock.vae.config.z_dim == stock.transformer.config.in_channels == 16
    assert (stock.vae_scale_factor_spatial, stock.vae_scale_factor_temporal) == (8, 4)
    sigmas = stock.scheduler.config
    assert (sigmas.use_flow_sigmas, sigmas.prediction_type, sigmas.flow_shift) == (True, "flow_prediction", 3.0)
    options = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 2, "max_sequence_length": 32}
    frames = stock("a red disc moves left", **options, output_type="pt").frames
    assert frames.shape == (1, 17, 3, 64, 64)
    assert bool(frames.isfinite().all())


@pytest.mark.slow
def test_the_same_seed_makes_the_same(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        make_tiny_wan(tmp_path / name, seed=seed, clips=2)
    for path in sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors")):
        one, same, other = (load_file(tmp_path / name / path) for name in ("one", "same", "other"))
        assert all(torch.equal(one[name], same[name]) for name in one), path
        assert any(one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_its_latents_are_its_own_videos_encoded(tiny):
    vae, tokenizer, encoder = load_parts(tiny, "vae", "tokenizer", "text_encoder")
    data = LatentSet(tiny / "latents")
    captions, video = moving_shapes(len(data), generator(0))
    latents, prompts = data.rows(range(len(data)))
    assert len(data) == 16
    assert data.shape == (5, 16, 8, 8)
    assert data.captions(range(16)) == captions
    assert float((encode_video(vae, video[:3]) - latents[:3]).abs().max()) < 1e-4
    assert float((encode_prompts(tokenizer, encoder, captions, TINY_LENGTH) - prompts).abs().max()) < 1e-5
    assert float((encode_prompts(tokenizer, encoder, ["ugly"], TINY_LENGTH) - data.null).abs().max()) < 1e-5
    assert data.null_text == "ugly"
    assert torch.allclose(latents.mean((0, 1, 3, 4)), torch.zeros(16), atol=1e-4)  # normalised, channel by channel
    assert torch.allclose(latents.std((0, 1, 3, 4)), torch.ones(16), atol=1e-3)


def test_shapes_move_as_their_captions_say():
    captions, video = moving_shapes(12, generator(3))
    assert len(set(captions)) > 6
    grid = torch.linspace(-1, 1, 64)
    for caption, clip in zip(captions, video, strict=True):
        weight = (clip - 0.3).abs().sum(1)  # (T, H, W)
        x, y = ((weight * along).sum((1, 2)) / weight.sum((1, 2)) for along in (grid, grid[:, None]))
        moved = float(x[-1] - x[0]), float(y[-1] - y[0])
        way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[caption.split()[-1]]
        assert moved == pytest.approx(way, abs=0.05)  # at the edge it leaves the picture a little


# The transformer


@pytest.mark.parametrize("bare", [False, True])
def test_on_the_diagonal_it_is_the_stock_wan_of_that_folder(tiny, stock, batch, bare):
    transformer = load_transformer(tiny / "transformer" if bare else tiny, "bidirectional")
    assert isinstance(transformer, AnyFlowTransformer3DModel)
    assert not transformer.training
    assert (transformer.config.gate_value, transformer.config.deltatime_type) == (0.25, "r")
    z, prompt = batch["x"], batch["condition"]["prompt"]
    with torch.no_grad():
        expected = stock.transformer(z.transpose(1, 2), 1000 * T, prompt, return_dict=False)[0].transpose(1, 2)
        out = WanNetwork(transformer)(z, T, T, prompt)
        off = WanNetwork(transformer)(z, T, 0 * T, prompt)
    assert float((out - expected).abs().max()) < 1e-5
    assert float((off - expected).abs().max()) > 1e-3


def test_a_causal_one_is_it_too_in_a_single_chunk(tiny, batch):
    bidirectional = load_transformer(tiny, "bidirectional")
    causal = load_transformer(tiny, "causal", full_chunk_limit=2, partition=(1, 2, 2))
    assert isinstance(causal, AnyFlowFARTransformer3DModel)
    assert (causal.config.full_chunk_limit, tuple(causal.config.chunk_partition)) == (2, (1, 2, 2))
    given = batch["x"], T, T / 2, batch["condition"]["prompt"]
    with torch.no_grad():
        whole = CausalNetwork(causal, first=5)(*given)
        assert float((whole - WanNetwork(bidirectional)(*given)).abs().max()) < 1e-5
        whole_clip = load_transformer(tiny, "causal", full_chunk_limit=3)
        assert float((whole - CausalNetwork(whole_clip, first=1, rest=2)(*given)).abs().max()) > 1e-3
    expected = causal_from(bidirectional, 2, (1, 2, 2)).state_dict()
    for name, value in causal.state_dict().items():
        assert torch.equal(value, expected[name]), name
    published = load_transformer(tiny, "causal").config
    assert (published.full_chunk_limit, sum(published.chunk_partition)) == (3, 21)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_half_precision_keeps_what_must_be_float32(tiny, batch, architecture):
    transformer = load_transformer(tiny, architecture, torch.bfloat16)
    kept = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    for name, weight in transformer.named_parameters():
        whole = any(part in kept for part in name.split("."))
        assert weight.dtype == (torch.float32 if whole else torch.bfloat16), name
        assert weight.device.type == "cpu", name  # nothing is left without numbers
    embedder = transformer.condition_embedder
    for name, value in embedder.time_embedder.state_dict().items():
        assert value.dtype == torch.float32
        copy = embedder.delta_embedder.state_dict()[name]
        assert torch.equal(copy, value.to(torch.bfloat16))
        assert copy.data_ptr() != value.data_ptr()
    whole = load_transformer(tiny, architecture)
    assert torch.equal(whole.scale_shift_table, transformer.scale_shift_table)  # never rounded on the way
    z, prompt = (each.to(torch.bfloat16) for each in (batch["x"], batch["condition"]["prompt"]))
    kind = WanNetwork if architecture == "bidirectional" else partial(CausalNetwork, first=5)
    with torch.no_grad():  # no autocast needed: it computes in bfloat16 as it is
        out, expected = kind(transformer)(z, T, T / 2, prompt), kind(whole)(z.float(), T, T / 2, prompt.float())
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_saved_with_two_times_it_is_loaded_with_both(tiny, architecture, tmp_path):
    """The embedder of the target time and coarse patches of a trained source are its own, not copies."""
    transformer = load_transformer(tiny, architecture, full_chunk_limit=2, partition=(1, 2, 2))
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "delta_embedder" in name or "far_patch" in name:
                weight += 0.5
    transformer.save_pretrained(tmp_path / "transformer")
    again = load_transformer(tmp_path, architecture)
    for name, value in transformer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.config.get("full_chunk_limit") == (2 if architecture == "causal" else None)  # its own
    if architecture == "bidirectional":
        causal = load_transformer(tmp_path, "causal").state_dict()
        name = "condition_embedder.delta_embedder.linear_1.bias"
        assert torch.equal(causal[name], transformer.state_dict()[name])
    else:
        with pytest.raises(InputError, match="is causal; expected Wan or a bidirectional one: set architecture=causal"):
            load_transformer(tmp_path, "bidirectional")


def as_first_released(folder, pipeline):
    """A folder with the names and options that AnyFlow's first releases have in their metadata."""
    index = folder / "model_index.json"
    entries = {"transformer": ["far", "FAR_Wan_Transformer3DModel"], "scheduler": ["far", "FlowMapDiscreteScheduler"]}
    change_config(index, _class_name=pipeline, **entries)
    scheduler = {"_class_name": "FlowMapDiscreteScheduler", "shift": 5.0, "num_train_timesteps": 1000}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | {"weight_type": "gaussian"}))
    causal = pipeline == "FARWanAnyFlowPipeline"
    options = {} if causal else {"chunk_partition": None, "full_chunk_limit": 3, "compressed_patch_size": [1, 4, 4]}
    options |= {"init_far_model": causal, "init_flowmap_model": True, "qk_norm": "rms_norm_across_heads"}
    change_config(folder / "transformer/config.json", _class_name="FAR_Wan_Transformer3DModel", **options)


@pytest.fixture
def released(copied):
    """{architecture: a whole pipeline folder of that kind, named as AnyFlow's first releases}."""
    folders = {}
    names = {"bidirectional": "WanAnyFlowPipeline", "causal": "FARWanAnyFlowPipeline"}
    for architecture, pipeline in names.items():
        folder = folders[architecture] = shutil.copytree(copied, copied.parent / architecture)
        transformer = load_transformer(copied, architecture, full_chunk_limit=2, partition=(1, 2, 2))
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if "delta_embedder" in name or "far_patch" in name:
                    weight += 0.5
        shutil.rmtree(folder / "transformer")
        transformer.save_pretrained(folder / "transformer")
        as_first_released(folder, pipeline)
    return folders


@pytest.mark.slow
def test_weights_under_their_first_names_are_loaded_wherever_a_folder_is_named(released):
    for architecture, folder in released.items():
        transformer, state = load_transformer(folder, architecture), load_file(folder / WEIGHTS)
        assert transformer.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())
        source = find_source(str(folder), torch.float32, "cpu")  # for sample and evaluate
        assert (source.config.architecture, source.config.stage, source.config.shift) == (architecture, "forward", 5.0)
        assert all(torch.equal(value, state[name]) for name, value in source.network.transformer.state_dict().items())
        assert (source.config.causal.first, source.config.causal.rest) == (
            (1, 2) if architecture == "causal" else (1, 3)
        )
        transformer.save_pretrained(folder / "again")
        assert json.loads((folder / "again/config.json").read_text())["_class_name"] == type(transformer).__name__
    causal = load_transformer(released["bidirectional"], "causal")  # as the base of a causal run
    assert sum(causal.config.chunk_partition) == 21
    with refused("causal is causal; expected Wan or a bidirectional one"):
        load_transformer(released["causal"], "bidirectional")


@pytest.mark.slow
def test_files_that_contradict_each_other_are_one_line_that_names_both(released, tiny):
    own = "/transformer/config.json"
    for architecture, path, changes, words in (
        (
            "causal",
            "model_index.json",
            {"_class_name": "WanAnyFlowPipeline"},
            f"model_index.json has _class_name WanAny.*{own} _class_name FAR_Wan",
        ),
        ("causal", "model_index.json", {"_class_name": "AnyFlowPipeline"}, f"has _class_name AnyFlowPipeline.*{own}"),
        (
            "bidirectional",
            "model_index.json",
            {"transformer": ["diffusers", "WanTransformer3DModel"]},
            f"has transformer .*Wan.*{own}",
        ),
        ("causal", "transformer/config.json", {"in_channels": 8}, f"vae/config.json has z_dim 16.*{own} in_channels 8"),
        (
            "causal",
            "transformer/config.json",
            {"text_dim": 8},
            f"text_encoder/config.json has d_model 32.*{own} text_dim 8",
        ),
        (
            "causal",
            "transformer/config.json",
            {"ffn_dim": 64},
            r"weights of the transformer in .* have .*128.*, but .*64.* by its config.json",
        ),
        (
            "causal",
            "transformer/config.json",
            {"_class_name": "FAR_Transformer"},
            "causal holds a FAR_Transformer; expected one of Wan",
        ),
        (
            "causal",
            "model_index.json",
            {"_class_name": "FARPipeline"},
            "causal holds a FARPipeline; expected the folder of a run",
        ),
    ):
        file = released[architecture] / path
        before = file.read_text()
        change_config(file, **changes)
        with refused(words):
            find_source(str(released[architecture]), torch.float32, "cpu")
        file.write_text(before)
    for missing, words in (
        (WEIGHTS, "no file named .*safetensors found in directory .*causal/transformer"),
        ("transformer/config.json", "no file named config.json.*causal/transformer"),
    ):
        (released["causal"] / missing).unlink()
        with refused(words):
            load_transformer(released["causal"], "causal")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_nothing_is_unpickled(copied, part):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(copied / 'sprung')!r}, 'w')",))

    (weights,) = (copied / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"x": Trap()}, copied / part / name)
    with refused(f"the {part} of .* does not load .*no file named .*safetensors"):
        load_transformer(copied, "causal") if part == "transformer" else load_parts(copied, part)
    assert not (copied / "sprung").exists()


def without(name):
    return lambda state: {key: value for key, value in state.items() if name not in key}


def ill(state, number=torch.inf):
    """One number of the last tensor of many values is not finite, in its middle."""
    state = {key: value.clone() for key, value in state.items()}
    weight = state.get("blocks.1.attn1.to_q.weight", next(reversed(state.values())))
    weight.view(-1)[weight.numel() // 2] = number
    return state


@pytest.mark.slow
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
@pytest.mark.parametrize("part", ["vae", "text_encoder", "lora"])
def test_weights_that_are_not_finite_are_one_line(copied, part, number):
    if part == "lora":
        transformer = load_transformer(copied, "bidirectional")
        add_role(transformer, "x", 2)
        state = {name: value.contiguous() for name, value in Adapter(transformer, "x").state_dict().items()}
        AnyFlowPipeline.save_lora_weights(copied / "lora", ill(state, number))
        with refused(r"lora_\S* in .*lora holds NaN or infinite values"):
            load_lora(load_transformer(copied, "bidirectional"), copied / "lora")
    else:
        (path,) = (copied / part).glob("*.safetensors")
        rewrite(path, lambda state: ill(state, number))
        with refused(rf"of the {part} in .* holds NaN or infinite values; .*: fetch or make it again"):
            load_parts(copied, part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files: dict.fromkeys(files, min(files.values())), r"lack .* in all\); expected those of a Wan"),
        (lambda files: dict.fromkeys(files, "../../x.safetensors"), "does not load .*parent-directory"),
        (lambda files: files | {"proj_out.bias": "gone.safetensors"}, "does not load .*gone.safetensors"),
        (lambda files: [files], "does not load"),
    ],
)
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_an_index_that_does_not_fit_its_files_is_one_line(copied, architecture, spoil, message):
    path = copied / WEIGHTS
    state, files = load_file(path), {}
    path.unlink()
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        part = path.with_name(f"{path.stem}-0000{number}-of-00002.safetensors")
        save_file({name: state[name] for name in names}, part, {"format": "pt"})
        files |= dict.fromkeys(names, part.name)
    index = path.with_name(f"{path.name}.index.json")
    for change, refusal in ((dict, nullcontext()), (spoil, refused(message))):
        index.write_text(json.dumps({"metadata": {}, "weight_map": change(files)}))
        with refusal:
            load_transformer(copied, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_broken_weights_are_one_line(copied, architecture):
    path, whole = copied / WEIGHTS, (copied / WEIGHTS).read_bytes()
    expected = "; expected those of a WanTransformer3DModel"
    for change, message in (
        (without("blocks.1.attn1.to_q.weight"), rf"lack blocks\.1\.attn1\.to_q\.weight \(1 in all\){expected}"),
        (lambda state: state | {"blocks.7.attn1.to_q.weight": torch.zeros(3)}, r"add blocks\.7\.attn1\.to_q\.weight"),
        (
            lambda state: state | {"proj_out.bias": torch.zeros(7)},
            r"have proj_out\.bias \(7,\), but \(64,\) by its config",
        ),
        (ill, r"blocks\.1\.attn1\.to_q\.weight of the transformer in .* holds NaN or infinite values"),
        (None, "the transformer of .* does not load .*; fetch or make it again"),
    ):
        path.write_bytes(whole if change else whole[:-100])
        if change:
            rewrite(path, change)
        with pytest.raises(InputError, match=message) as problem:
            load_transformer(copied, architecture)
        assert "\n" not in str(problem.value)
    path.write_bytes(whole)
    load_transformer(copied, "bidirectional").save_pretrained(copied / "two")
    rewrite(copied / "two/diffusion_pytorch_model.safetensors", without("delta_embedder"))
    with pytest.raises(InputError, match=r"lack condition_embedder\.delta_embedder\.linear_1\.bias \(4 in all\)"):
        load_transformer(copied / "two", "bidirectional")


def test_other_architectures_and_places_that_do_not_exist(tiny, copied, tmp_path):
    path = copied / "transformer/config.json"
    change_config(path, image_dim=1280)
    with refused("takes an image beside the text"):
        load_transformer(copied, "causal")
    change_config(path, _class_name="UNet2DConditionModel")
    with refused("holds a UNet2DConditionModel; expected one of WanTransformer3DModel"):
        load_transformer(copied, "bidirectional")
    path.write_text("{")
    (tmp_path / "other/latents").mkdir(parents=True)
    for source, architecture, words in (
        (copied, "casual", "unknown architecture 'casual'.*did you mean 'causal'"),
        (copied, "bidirectional", "the transformer of .* does not load"),
        ("/no/such", "bidirectional", "no folder /no/such; expected a pipeline folder, or a name on the hub"),
        ("./here", "bidirectional", r"no folder \./here"),
        (tmp_path / "other", "bidirectional", "no transformer in .*; expected a pipeline folder.*found latents"),
    ):
        with refused(words):
            load_transformer(source, architecture)
    with refused("no vae in .*transformer; expected a pipeline folder"):
        load_parts(tiny / "transformer", "vae")
    with refused("unknown part 'text'.*did you mean 'text_encoder'"):
        load_parts(tiny, "text")


def test_the_hub_is_asked_only_for_names_and_its_failure_is_one_line(monkeypatch):
    asked = []

    def refuse(pretrained_model_name_or_path, subfolder):
        asked.append((pretrained_model_name_or_path, subfolder))
        raise OSError("We could not connect\nat all")

    monkeypatch.setattr(WanTransformer3DModel, "load_config", refuse)
    with pytest.raises(InputError, match=r"of nobody/nothing does not load \(We could not connect\); check the name"):
        load_transformer("nobody/nothing", "bidirectional")
    assert asked == [("nobody/nothing", "transformer")]

    def offline(**_):
        try:
            raise LocalEntryNotFoundError("Cannot find it on disk")
        except EntryNotFoundError:
            raise OSError("nobody/nothing does not appear to have a file named config.json.") from None

    monkeypatch.setattr(WanTransformer3DModel, "load_config", offline)
    with refused(r"nobody/nothing does not load \(the hub is not reached, .*\); check the name and the network"):
        load_transformer("nobody/nothing", "bidirectional")


# The other parts


def test_prompts_are_embedded_as_stock_embeds_them(tiny, stock):
    tokenizer, encoder = load_parts(tiny, "tokenizer", "text_encoder")
    for length in (TINY_LENGTH, 512, 5):  # 5: cut
        with torch.no_grad():
            expected, null = stock.encode_prompt(CAPTIONS, max_sequence_length=length)
        out = encode_prompts(tokenizer, encoder, CAPTIONS, length)
        assert out.shape == (3, length, 32)
        assert torch.equal(out, expected)
        assert torch.equal(out[2], null[0])
    assert float(out.abs().mean()) > 0.01
    assert not torch.equal(out[0], out[1])
    tokens = len(tokenizer(CAPTIONS[0]).input_ids)
    long = encode_prompts(tokenizer, encoder, CAPTIONS[:1], 32)[0]
    assert bool((long[tokens:] == 0).all())  # stopped where the text ends
    assert bool((long[:tokens] != 0).any(1).all())
    for caption in CAPTIONS:  # any text is known
        tokens = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption
    for wrong in ([], "a text"):
        with pytest.raises(InputError, match="expected a list of at least one text"):
            encode_prompts(tokenizer, encoder, wrong)


@pytest.mark.slow
def test_video_goes_through_the_codec_as_in_stock(tiny, stock):
    (vae,) = load_parts(tiny, "vae")
    assert not any(weight.requires_grad for weight in vae.parameters())
    latents = LatentSet(tiny / "latents").rows([0, 1])[0]
    video = decode_latents(vae, latents)
    assert video.shape == (2, 17, 3, 64, 64)
    options = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 1, "guidance_scale": 1.0}
    stock_latents = {}

    def put(pipeline, step, time, given):
        stock_latents["z"] = given["latents"]
        return {"latents": latents.transpose(1, 2)}

    options |= {"max_sequence_length": 32, "callback_on_step_end": put, "output_type": "pt"}
    expected = stock(["one", "two"], **options).frames
    assert stock_latents["z"].shape == latents.transpose(1, 2).shape
    assert float((video - expected).abs().max()) < 1e-5
    for shape in ((1, 16, 3, 64, 64), (1, 17, 1, 64, 64), (1, 17, 3, 60, 64)):
        with pytest.raises(InputError, match=r"expected \(B, T, 3, H, W\) with T = 4 n \+ 1.*multiples of 8"):
            encode_video(vae, torch.zeros(shape))


@pytest.mark.slow
def test_parts_keep_their_dtype_rules_and_are_whole(copied):
    encoder, vae, scheduler = load_parts(copied, "text_encoder", "vae", "scheduler", dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    assert vae.dtype == torch.float32
    assert scheduler.config.flow_shift == 3.0
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    rewrite(copied / "text_encoder/model.safetensors", lambda state: {k: v for k, v in state.items() if k != name})
    with pytest.raises(InputError, match=f"lack {name}".replace(".", r"\.")):
        load_parts(copied, "text_encoder")
    change_config(copied / "scheduler/scheduler_config.json", _class_name="Clock")
    with pytest.raises(InputError, match=r"the scheduler in .* is a Clock"):
        load_parts(copied, "scheduler")
    level = transformers.utils.logging.get_verbosity()
    (copied / "tokenizer/tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer of .* does not load"):
        load_parts(copied, "tokenizer")
    assert transformers.utils.logging.get_verbosity() == level  # and nobody is left silenced


@pytest.mark.slow
def test_the_text_encoder_is_of_the_class_that_the_index_names(copied):
    """As of pipelines of Wan's family with T5 in the place of UMT5."""
    options = json.loads((copied / "text_encoder/config.json").read_text())
    keys = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size")
    encoder = transformers.T5EncoderModel(transformers.T5Config(**{key: options[key] for key in keys})).eval()
    encoder.save_pretrained(copied / "text_encoder")
    change_config(copied / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    tokenizer, loaded = load_parts(copied, "tokenizer", "text_encoder")
    assert isinstance(loaded, transformers.T5EncoderModel)
    assert torch.equal(*(encode_prompts(tokenizer, one, CAPTIONS[:1], 8) for one in (encoder, loaded)))
    change_config(copied / "model_index.json", text_encoder=["transformers", "Clock"])
    with refused(r"the text_encoder in .* is a Clock; expected UMT5EncoderModel or T5EncoderModel"):
        load_parts(copied, "text_encoder")


# The command


@pytest.mark.slow
def test_the_command_makes_one_or_says_why_not(tmp_path, capsys, monkeypatch):
    out = tmp_path / "made"
    assert run(lambda: command([str(out), "--seed", "2"])) == 0
    assert f"written: {out}/videos and captions.jsonl, 16 captioned clips" in capsys.readouterr().out
    assert all((out / "videos" / clip.file).is_file() for clip in read_captions(out / "captions.jsonl"))
    assert load_transformer(out, "causal").config.num_layers == 2
    for arguments, message in (
        ([str(out)], f"error: {out} exists and is not an empty folder"),
        ([], "required: OUT"),
        ([str(out / "model_index.json/deeper")], "name a folder you may write to"),
    ):
        assert run(lambda arguments=arguments: command(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minianyflow.wan.folders.write_latents", fail)
    with pytest.raises(InputError, match=r"cannot write .*\(No space left on device\); make room"):
        make_tiny_wan(tmp_path / "half", clips=1)
    assert list(tmp_path.iterdir()) == [out]
