"""Export and sampling of a tiny Wan: what comes out is the run's own network, or one line."""

import json
import locale
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution

import imageio.v2 as imageio
import pytest
import torch
from accelerate import Accelerator
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, FlowMapEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import safe_open
from safetensors.torch import load_file

from minianyflow.networks.causal_attention import CausalAttention
from minianyflow.networks.lora_layouts import from_layout
from minianyflow.support.cli import run
from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.training import Role
from minianyflow.wan.commands import export
from minianyflow.wan.commands import sample as sampling
from minianyflow.wan.config import Config, load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.data.write_video import write_clips
from minianyflow.wan.export import card, notes, push_to_hub
from minianyflow.wan.folders import TINY_TRANSFORMER, encode_prompts, load_parts, load_transformer, moving_shapes
from minianyflow.wan.run import load_run, read_run, save_run
from minianyflow.wan.run_networks import RunNetworks, network_of
from minianyflow.wan.sampler import sample
from minianyflow.wan.sources import find_source
from minianyflow.wan.stages import optimiser
from tests.refused import refused as refused_directly

pytestmark = pytest.mark.slow
ARCHITECTURES = {"bidirectional": AnyFlowPipeline, "causal": AnyFlowFARPipeline}
PROMPTS = ["a red square moves left", "a blue disc moves up"]
CLIP = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 32}


def run_main(command, argv):
    return run(lambda: command(argv))


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """{architecture: a finished run}, its student of random weights, the last ones others; and the base under "wan"."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "wan").symlink_to(tiny)
    for architecture in ARCHITECTURES:
        make_run(folder, architecture, "forward", folder / architecture)
    return folder


def make_run(folder, architecture, stage, output, *changes):
    """What distill.py leaves, without its training: alpha is half the rank."""
    where = [f"base={folder}/wan", f"data={folder}/wan/latents", f"output={output}"]
    config = load_config([architecture, stage, "tiny"], [*where, "alpha=2", "log.tracker=none", *changes])
    networks = RunNetworks(config, 5)
    student = networks.trained("student")
    torch.manual_seed(1)
    with torch.no_grad():
        if config.trained == "lora":
            for weight in student.parameters():
                weight.normal_(std=0.2)
        role = Role(student, **optimiser(config))  # the average begins here
        for weight in student.parameters():
            weight.mul_(1.1)
    save_run(config, LatentSet(config.data), networks, {"student": role}, [], 0.0, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """{architecture: its run as a pipeline folder}."""
    folder = tmp_path_factory.mktemp("exported")
    for architecture in ARCHITECTURES:
        assert run_main(export, [str(runs / architecture), str(folder / architecture)]) == 0
    return folder


@pytest.fixture(scope="module")
def embedded(runs):
    return encode_prompts(*load_parts(runs / "wan", "tokenizer", "text_encoder"), PROMPTS, 32)


def noise(frames=5):
    return torch.randn(2, frames, 16, 8, 8, generator=generator(0))


def ours(run, embedded, steps, role="student", z=None, prefix=None):
    """What our sampler makes of the run, as it trains: the adapter beside the base, not merged."""
    transformer, config = load_run(run, role)
    return sample(config, network_of(transformer, config), noise() if z is None else z, embedded, steps, prefix)


def theirs(pipeline, steps, z=None, **options):
    """What a stock pipeline makes of the same noise, causal ones with our attention."""
    if isinstance(pipeline, AnyFlowFARPipeline):
        for block in pipeline.transformer.blocks:
            block.attn1.set_processor(CausalAttention())
    pipeline.set_progress_bar_config(disable=True)
    z = noise() if z is None else z.clone()
    options = CLIP | {"output_type": "latent", "num_inference_steps": steps} | options
    return pipeline(PROMPTS, latents=z.transpose(1, 2), **options).frames.transpose(1, 2)


def stock(architecture, folder):
    return ARCHITECTURES[architecture].from_pretrained(folder)


def base_pipeline(architecture, runs, dtype=torch.float32):
    """The base in the class with two times, in a stock pipeline."""
    limit = 2 if architecture == "causal" else None
    transformer = load_transformer(runs / "wan", architecture, dtype, limit, (1, 2, 2) if limit else None)
    parts = load_parts(runs / "wan", "tokenizer", "text_encoder", "vae")
    return ARCHITECTURES[architecture](*parts[:2], transformer, parts[2], FlowMapEulerDiscreteScheduler(1000, 5.0))


def distance(one, other):
    assert one.shape == other.shape
    return float((one - other).abs().max())


def refused(capsys, script, arguments, message):
    """One line on stderr, status 2."""
    assert run_main(script, list(map(str, arguments))) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert re.search(message, error[0]), error[0]


# ---- export


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [1, 3])
def test_stock_diffusers_samples_what_our_sampler_does(runs, exported, embedded, architecture, steps):
    expected = ours(runs / architecture, embedded, steps)
    assert distance(theirs(stock(architecture, exported / architecture), steps), expected) < 1e-5
    assert distance(theirs(base_pipeline(architecture, runs), steps), expected) > 0.1  # the adapter is in it
    assert distance(ours(runs / architecture, embedded, steps, "student-last"), expected) > 1e-3


def test_the_last_weights_can_be_exported(runs, embedded, tmp_path):
    out = tmp_path / "last"
    assert run_main(export, [str(runs / "bidirectional"), str(out), "--role", "student-last"]) == 0
    expected = ours(runs / "bidirectional", embedded, 2, "student-last")
    assert distance(theirs(stock("bidirectional", out), 2), expected) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_export_says_what_it_is(runs, exported, architecture):
    folder = exported / architecture
    config = json.loads((folder / "transformer/config.json").read_text())
    if architecture == "causal":
        assert (config["chunk_partition"], config["full_chunk_limit"]) == ([1, 2, 2], 2)
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["shift"] == 5.0
    readme = (folder / "README.md").read_text()
    made = json.loads(re.search(r"```json\n(.*?)```", readme, re.S)[1])
    assert (made["role"], made["stage"], made["base"]) == ("student", "forward", str(runs / "wan"))
    assert "licence" in readme
    assert ("pads the keys" in readme) == (architecture == "causal")


@pytest.mark.skipif(bool(sys.flags.utf8_mode), reason="no locale counts then")
@pytest.mark.parametrize(("prompt", "more"), [("一只红色的熊猫", []), ("un café", ["--lora"]), ("“a” – 🐼", [])])
def test_a_locale_that_is_not_utf8_changes_no_file(runs, tmp_path, prompt, more):
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        assert locale.getencoding() != "UTF-8"
        make_run(runs, "bidirectional", "forward", tmp_path / "run", f"samples.prompts=['{prompt}']")
        assert load_run(tmp_path / "run")[1].samples.prompts == [prompt]
        assert run_main(export, [str(tmp_path / "run"), str(tmp_path / "out"), *more]) == 0
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert prompt in (tmp_path / "out/README.md").read_text("utf-8")


def test_a_short_last_chunk_is_written(runs, embedded, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(runs, "causal", "forward", run, "causal.rest=3")
    assert run_main(export, [str(run), str(out)]) == 0
    pipeline = stock("causal", out)
    assert tuple(pipeline.transformer.config.chunk_partition) == (1, 3, 1)
    assert distance(theirs(pipeline, 2), ours(run, embedded, 2)) < 1e-5


def test_a_teacher_is_kept_to_its_velocity(runs, embedded, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(runs, "bidirectional", "teacher", run)
    config, _ = read_run(run)
    assert run_main(export, [str(run), str(out)]) == 0
    pipeline, expected = stock("bidirectional", out), ours(run, embedded, 3)
    assert distance(theirs(pipeline, 3, use_mean_velocity=False), expected) < 1e-5
    assert distance(theirs(pipeline, 3), expected) > 1e-3
    assert "use_mean_velocity=False" in re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    network = network_of(load_run(run)[0], config)
    assert distance(sample(replace(config, stage="forward"), network, noise(), embedded, 3), expected) > 1e-3
    source = find_source(str(out), torch.float32, torch.device("cpu"))
    assert distance(sample(source.config, source.network, noise(), embedded, 3), expected) < 1e-5


def test_all_weights_are_exported_too(runs, embedded, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(runs, "bidirectional", "forward", run, "trained=full")
    assert run_main(export, [str(run), str(out)]) == 0
    assert distance(theirs(stock("bidirectional", out), 2), ours(run, embedded, 2)) < 1e-5
    capsys.readouterr()
    refused(capsys, export, [run, tmp_path / "lora", "--lora"], "trained all weights, and has no adapter")


def test_half_precision_is_as_asked(runs, tmp_path):
    assert run_main(export, [str(runs / "causal"), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    with safe_open(tmp_path / "half/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds["blocks.0.attn1.to_q.weight"] == "BF16"
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == "F32"
    assert not [name for name in kinds if "lora" in name]


# ---- the adapter alone


@pytest.fixture(scope="module")
def adapters(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for architecture in ARCHITECTURES:
        assert run_main(export, [str(runs / architecture), str(folder / architecture), "--lora"]) == 0
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adapter_does_in_a_stock_pipeline_what_it_does_here(runs, adapters, embedded, architecture):
    expected, pipeline = ours(runs / architecture, embedded, 2), base_pipeline(architecture, runs)
    plain = theirs(pipeline, 2)
    pipeline.load_lora_weights(adapters / architecture)
    assert distance(theirs(pipeline, 2), expected) < 1e-5
    assert distance(plain, expected) > 0.1
    pipeline.unload_lora_weights()
    assert distance(theirs(pipeline, 2), plain) == 0


FEW = {"text": (4,), "image": (4,), "video": (4,)}
CASES = {"whole": {"text": (1, 4, 32), "image": (1, 32), "video": (1, 32)}, "lora": FEW, "half": FEW}
STOCK = """
import importlib.util, json, re, sys
assert not importlib.util.find_spec("minianyflow")
import torch
from diffusers.utils import load_image
frames = [[*load_image(f"in/x-0/{number:05}.png").getdata()] for number in range(9)]
frames = torch.tensor(frames, dtype=torch.float32).view(1, 9, 64, 64, 3).permute(0, 1, 4, 2, 3) / 255
known = {"text": "", "image": "video=frames[:, :1], ", "video": "video=frames, "}
for folder, cases in json.loads(sys.argv[1]).items():
    lines = re.search(r"```python\\n(.*?)```", open(f"{folder}/README.md").read(), re.S)[1]
    exec(lines)
    assert video.shape == (17, 64, 64, 3), video.shape
    call = lines[lines.index("video = pipeline(") : lines.index(".frames[0]")].replace("video =", "made =")
    latents = {}
    for start, steps in ((start, steps) for start in cases for steps in cases[start]):
        options = f'{known[start]}num_inference_steps={steps}, output_type="latent"'
        exec(call.replace("num_inference_steps=4", options))
        latents[start, steps] = made.frames[0].transpose(0, 1).float()
    torch.save(latents, f"{folder}.pt")
"""


def environment(folder, names):
    """The packages of that name and what they require, out of those installed here, in a folder for PYTHONPATH."""
    folder.mkdir()
    there, queue = set(), [re.match(r"[\w.-]+", name)[0] for name in names]
    while queue:
        if (name := canonicalize_name(queue.pop())) in there:
            continue
        there.add(name)
        package = distribution(name)
        required = map(Requirement, package.requires or [])
        queue += [each.name for each in required if not each.marker or each.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))
    return os.environ | {"PYTHONPATH": str(folder)}


def test_the_readmes_lines_sample_the_same_without_this_project(runs, exported, adapters, tmp_path):
    """With the packages that a README names alone, in stock diffusers, and by `minianyflow sample`: equal latents.

    In bfloat16 stock rounds the states of the sampler too; here they are float32.
    """
    halves = tmp_path / "halves"
    for architecture in ARCHITECTURES:
        assert run_main(export, [str(runs / architecture), str(halves / architecture), "--dtype", "bf16"]) == 0
    folders = {}
    for kind, made in (("whole", exported), ("lora", adapters), ("half", halves)):
        for architecture in ARCHITECTURES:
            folder = folders[kind, architecture] = tmp_path / f"{kind}-{architecture}"
            shutil.copytree(made / architecture, folder)
            text = (folder / "README.md").read_text()
            (folder / "README.md").write_text(text.replace(f'"{architecture}"', f'"{folder.name}"'))
    write_clips(tmp_path / "in", {"x": moving_shapes(1, generator(0))[1]}, ["x"], png=True)
    pictures = [imageio.imread(tmp_path / f"in/x-0/{number:05}.png") for number in range(17)]
    imageio.mimwrite(tmp_path / "in/x.mkv", pictures, codec="ffv1", pixelformat="bgr0", fps=16)  # without loss
    cases = json.dumps({folder.name: CASES[kind] for (kind, _), folder in folders.items()})
    readme = (folders["lora", "causal"] / "README.md").read_text()
    packages = environment(
        tmp_path / "packages", re.search(r"^pip install (.*)", readme, re.M)[1].replace('"', "").split()
    )
    command = [sys.executable, "-S", "-P", "-c", STOCK, cases]
    done = subprocess.run(command, cwd=tmp_path, env=packages, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "video.mp4").exists()
    prompt = load_config(["tiny"]).samples.prompts[0]
    starts = {"text": [], "image": ["--image", "in/x-0/00000.png"], "video": ["--video", "in/x.mkv", "--context", "9"]}
    for (kind, architecture), folder in folders.items():
        theirs, half = torch.load(f"{folder}.pt"), kind == "half"
        for start, steps in CASES[kind].items():
            words = [tmp_path / word if word.startswith("in/") else word for word in starts[start]]
            asked = [folder, "--prompt", prompt, "--steps", *steps, *words, "--precision", "bf16" if half else "fp32"]
            out = tmp_path / "out" / folder.name / start
            asked += ["--write", "latents", "--output", out]
            assert run_main(sampling, list(map(str, asked))) == 0
            for count in steps:
                mine = load_file(out / f"{count}_step{'s' * (count > 1)}-0.safetensors")["latents"]
                apart = distance(mine, theirs[start, count])
                assert apart < (0.1 if half else 1e-5), (kind, architecture, start, count, apart)
        assert kind != "whole" or distance(theirs["text", 1], theirs["text", 32]) > 1e-3


def test_an_adapter_that_is_lost_on_the_way_is_seen(runs, tmp_path, monkeypatch, capsys):
    run, out = runs / "causal", tmp_path / "out"
    real = AnyFlowFARPipeline.save_lora_weights
    for lose, message in (
        (lambda state, told: (dict(list(state.items())[2:]), told), "off"),  # a layer
        (lambda state, told: (state, told | {"lora_alpha": 4.0}), "off"),
        (lambda state, told: ({f"base.{name}": value for name, value in state.items()}, told), "off|does not load"),
    ):

        def save(folder, state, transformer_lora_adapter_metadata, lose=lose):
            state, told = lose(state, transformer_lora_adapter_metadata)
            real(folder, state, transformer_lora_adapter_metadata=told)

        monkeypatch.setattr(AnyFlowFARPipeline, "save_lora_weights", save)
        refused(capsys, export, [run, out, "--lora"], message)
        assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_effect_is_refused(runs, tmp_path, capsys):
    config = load_config(
        ["bidirectional", "forward", "tiny"],
        [f"base={runs}/wan", f"data={runs}/wan/latents", f"output={tmp_path}/run", "log.tracker=none"],
    )
    networks = RunNetworks(config, 5)
    save_run(
        config,
        LatentSet(config.data),
        networks,
        {"student": Role(networks.trained("student"))},
        [],
        0.0,
        Accelerator(cpu=True),
    )
    refused(capsys, export, [tmp_path / "run", tmp_path / "out", "--lora"], "run changes nothing; expected one that")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_one_line(runs, exported, tmp_path, capsys):
    refused(capsys, export, [tmp_path, tmp_path / "out"], "no config.yaml in .*; expected a run folder")
    refused(capsys, export, [runs / "causal", exported / "causal"], "exists and is not an empty folder")
    refused(capsys, export, [runs / "causal", exported / "causal", "--lora"], "exists and is not an empty folder")
    refused(capsys, export, [runs / "causal", tmp_path / "x", "--lora", "--dtype", "bf16"], "leave out --dtype")
    refused(capsys, export, [runs / "causal"], "required: OUT; see minianyflow export --help")
    broken = shutil.copytree(runs / "causal", tmp_path / "broken")
    (broken / "student.safetensors").unlink()
    refused(capsys, export, [broken, tmp_path / "x"], "broken is no run with an adapter of role 'student'")
    refused(capsys, export, [broken, tmp_path / "x", "--lora"], "broken is no run with an adapter of role 'student'")
    assert [each.name for each in tmp_path.iterdir()] == ["broken"]


def test_licences_are_followed_to_where_a_run_began(runs, tmp_path):
    config, _ = read_run(runs / "causal")
    assert "licence of" in notes(config)
    wan = replace(config, base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert "Apache" in notes(wan)
    assert {name: card(wan).get(name) for name in ("license", "base_model")} == {
        "license": "apache-2.0",
        "base_model": wan.base,
    }
    assert card(replace(wan, student="nvidia/AnyFlow-X"))["license_name"] == "non-commercial"
    for change in ({"base": "nvidia/AnyFlow-X"}, {"student": "nvidia/AnyFlow-X"}, {"teacher": "nvidia/AnyFlow-X"}):
        assert "non-commercial" in notes(replace(config, **change))
    first = shutil.copytree(runs / "causal", tmp_path / "first")
    text = (first / "config.yaml").read_text()
    (first / "config.yaml").write_text(re.sub(r"^student: .*$", "student: nvidia/AnyFlow-X", text, flags=re.M))
    assert "non-commercial" in notes(replace(config, student=str(first)))
    second, third = (shutil.copytree(first, tmp_path / name) for name in ("second", "third"))
    named = [("student", {first: first}), ("teacher", {first: first}), ("student", {first: second, second: first})]
    named += [("teacher", {first: second, second: third, third: second})]
    for name, links in named:  # runs that name themselves, or each other: the search ends
        for each, other in links.items():
            (each / "config.yaml").write_text(re.sub(rf"^{name}: .*$", f"{name}: {other}", text, flags=re.M))
        assert "licence of" in notes(replace(config, **{name: str(first)}))


@pytest.mark.parametrize("layout", ["wan", "kohya"])
def test_other_layouts_and_back(runs, adapters, tmp_path, layout, capsys):
    """Names as the tools have them; diffusers reads those that Wan's own code has; all come back, and are sampled."""
    out = tmp_path / layout
    assert run_main(export, [str(runs / "causal"), str(out), "--lora", "--layout", layout]) == 0
    assert "knows no\nlayers `delta_embedding`" in (out / "README.md").read_text()
    told, plain = (load_file(file) for file in (out / layout / "lora.safetensors", out / LORA_WEIGHT_NAME_SAFE))
    scale = 0.5  # alpha over rank, see make_run
    back = from_layout(told)
    assert back.keys() == from_layout(plain).keys()
    for name, value in from_layout(plain).items():
        assert distance(back[name], value * (scale if "lora_B" in name else 1)) < 1e-6
    if layout == "wan":  # kohya's reader wants every layer of a block
        theirs = _convert_non_diffusers_wan_lora_to_diffusers({k: v for k, v in told.items() if "blocks" in k})
        assert len(theirs) == sum("blocks" in name for name in told)
        for name, value in theirs.items():
            assert distance(value, back[name.removeprefix("transformer.")]) < 1e-6
    key = {
        "wan": "diffusion_model.blocks.1.self_attn.o.lora_A.weight",
        "kohya": "lora_unet_blocks_1_ffn_2.lora_up.weight",
    }
    assert key[layout] in told
    with refused_directly("x.lora_A.weight is no layer of a LoRA for Wan"):
        from_layout({f"{'diffusion_model.' if layout == 'wan' else 'lora_unet_'}x.lora_A.weight": torch.zeros(1)})


def test_an_adapter_for_another_base_is_one_line(runs, adapters, tmp_path, capsys):
    other = shutil.copytree(runs / "wan", tmp_path / "other")
    narrow = WanTransformer3DModel(**TINY_TRANSFORMER | {"ffn_dim": 64}, text_dim=32, freq_dim=64)
    narrow.save_pretrained(other / "transformer")
    asked = [adapters / "bidirectional", "--prompt", "x", "--output", tmp_path / "out"]
    refused(capsys, sampling, [*asked, "--base", other], "the adapter in .*bidirectional does not load .*size mismatch")
    refused(capsys, sampling, [*asked, "--base", tmp_path / "none"], "no folder .*none")
    refused(
        capsys, sampling, [runs / "causal", *asked[1:], "--base", other], "--base with .*causal, which holds its own"
    )


def test_a_push_can_be_looked_at_first(runs, tmp_path, monkeypatch, capsys):
    """The card has base, licence, recipe, figures and the sheet; nothing reaches for the hub until it is meant."""
    calls = []
    monkeypatch.setattr("minianyflow.wan.export.HfApi.create_repo", lambda *args, **kwargs: calls.append(args))
    run = shutil.copytree(runs / "bidirectional", tmp_path / "run")
    text = re.sub(r"^output: .*$", f"output: {run}", (run / "config.yaml").read_text(), flags=re.M)
    (run / "config.yaml").write_text(text)
    write_clips(run / "samples/000010", {"1 step": torch.rand(1, 5, 3, 16, 16)}, ["x"])
    assert run_main(export, [*map(str, [run, tmp_path / "out"]), "--lora", "--push", "me/blobs", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not calls
    assert re.search(r"0\.\d+ MB  pytorch_lora_weights.safetensors", said)
    assert "sheet.png" in said
    written = ModelCard.load(tmp_path / "out/README.md")
    assert (written.data.library_name, written.data.pipeline_tag) == ("diffusers", "text-to-video")
    assert "![Samples" in written.text
    made = json.loads(re.search(r"```json\n(.*?)```", written.text, re.S)[1])
    assert {"recipe", "losses", "evaluations_a_sample", "base"} <= made.keys()
    assert made["recipe"]["rank"] == 4
    for name in ("blobs", "a/b/c", "me/.."):
        refused(capsys, export, [run, tmp_path / "no", "--push", name], "--push takes owner/model")
    refused(capsys, export, [run, tmp_path / "no", "--dry-run"], "--dry-run without --push")
    refused(capsys, export, [run, tmp_path / "no", "--layout", "wan"], "--layout without --lora")
    assert not (tmp_path / "no").exists()

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("minianyflow.wan.export.HfApi.create_repo", offline)
    with refused_directly(r"cannot push to me/blobs \(no network\)"):
        push_to_hub(tmp_path / "out", "me/blobs")


# ---- the first frames known


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("known", [1, 3])
def test_a_start_comes_out_untouched_and_as_in_stock(runs, exported, embedded, architecture, known):
    prefix = noise().flip(0)[:, :known]
    expected = ours(runs / architecture, embedded, 3, prefix=prefix)
    assert torch.equal(expected[:, :known], prefix)
    made = theirs(stock(architecture, exported / architecture), 3, video_latents=prefix)
    assert distance(made, expected) < 1e-5
    other = ours(runs / architecture, embedded, 3, prefix=prefix + 1)
    assert distance(other[:, known:], expected[:, known:]) > 1e-3  # it is seen
    assert distance(expected[:, known:], ours(runs / architecture, embedded, 3)[:, known:]) > 1e-3


def test_a_start_hides_its_noise(runs, embedded):
    """What noise the known frames had is of no consequence, and nothing is written into it."""
    z, prefix = noise(), noise().flip(0)[:, :1]
    changed = torch.cat([z[:, :1] + 5, z[:, 1:]], 1)
    before = changed.clone()
    ends = [ours(runs / "bidirectional", embedded, 2, z=each, prefix=prefix) for each in (z, changed)]
    assert torch.equal(*ends)
    assert torch.equal(changed, before)


# ---- sample


def spied(monkeypatch):
    """What `run` has sampled, latents of every call, with its noise and prefix."""
    calls = []

    def spy(config, network, z, prompt, steps, prefix=None):
        made = sample(config, network, z, prompt, steps, prefix)
        calls.append({"z": z, "prompt": prompt, "steps": steps, "prefix": prefix, "made": made})
        return made

    monkeypatch.setattr("minianyflow.wan.sample.sample", spy)
    return calls


@pytest.mark.parametrize(("kind", "architecture"), [("run", "bidirectional"), ("export", "causal")])
def test_end_to_end(runs, exported, embedded, kind, architecture, tmp_path, monkeypatch, capsys):
    calls, source = spied(monkeypatch), (runs if kind == "run" else exported) / architecture
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]} \n", encoding="utf-8")
    asked = [source, "--prompts", tmp_path / "prompts.txt", "--steps", 1, 2, 1, "--output", tmp_path / "out"]
    assert run_main(sampling, list(map(str, asked))) == 0
    names = {f"{label}-{number}.mp4" for label in ("1_step", "2_steps") for number in (0, 1)} | {"sheet.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert len(imageio.mimread(tmp_path / "out/2_steps-1.mp4")) == 17
    assert [call["steps"] for call in calls] == [1, 2, 1, 2]
    assert torch.equal(calls[0]["z"], calls[1]["z"])  # every step count from the same noise
    assert not torch.equal(calls[0]["z"], calls[2]["z"])
    for number in (0, 1):
        call = calls[2 * number + 1]
        expected = ours(runs / architecture, embedded[number : number + 1], 2, z=call["z"])
        assert distance(call["prompt"], embedded[number : number + 1]) < 1e-6
        assert distance(call["made"], expected) < 1e-5
    capsys.readouterr()


def test_sizes_seeds_and_lengths_are_as_asked(runs, tmp_path, monkeypatch):
    calls, source = spied(monkeypatch), runs / "causal"
    size = ["--frames", 9, "--height", 32, "--width", 96, "--length", 16, "--steps", 1, "--output", tmp_path]
    for seed in (0, 0, 7):
        assert run_main(sampling, list(map(str, [source, "--prompt", "a disc", *size, "--seed", seed]))) == 0
    assert [tuple(call["z"].shape) for call in calls] == [(1, 3, 16, 4, 12)] * 3
    assert calls[0]["prompt"].shape[1] == 16
    assert torch.equal(calls[0]["made"], calls[1]["made"])
    assert not torch.equal(calls[0]["made"], calls[2]["made"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_goes_on_from_a_picture_or_a_video(runs, architecture, tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    write_clips(tmp_path / "in", {"x": moving_shapes(1, generator(0))[1]}, ["x"])
    asked = [runs / architecture, "--prompt", "x", "--steps", "1", "--output", tmp_path / "out"]
    for start in (["--image", "sheet.png"], ["--video", "x-0.mp4"], ["--video", "x-0.mp4", "--context", "1"]):
        assert run_main(sampling, [*map(str, asked), start[0], str(tmp_path / "in" / start[1]), *start[2:]]) == 0
    assert [call["prefix"].shape[1] for call in calls] == [1, 3, 1]
    for call in calls:
        assert torch.equal(call["made"][:, : call["prefix"].shape[1]], call["prefix"])
    assert distance(calls[1]["prefix"][:, :1], calls[2]["prefix"]) < 1e-5


def test_bad_input_to_sample_is_one_line(runs, exported, tmp_path, capsys):
    run, out = runs / "causal", ["--output", tmp_path / "out"]
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    prompt = ["--prompt", "x"]
    write_clips(tmp_path / "in", {"x": torch.rand(1, 17, 3, 16, 16)}, ["x"])
    video, image = ["--video", tmp_path / "in/x-0.mp4"], ["--image", tmp_path / "in/sheet.png"]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    (tmp_path / "next").mkdir()
    two = {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "next/model_index.json").write_text(json.dumps(two))
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "run.json").unlink()
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "run.json").write_text('{"steps": 1')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/model_index.json").write_text("{")
    damaged = shutil.copytree(exported / "causal", tmp_path / "damaged")
    (damaged / "minianyflow.json").write_text("{")
    for arguments, message in (
        ([tmp_path / "none", *prompt], "no folder .*none; expected the folder of a run or of an export"),
        (["none", *prompt], "no folder none"),
        ([tmp_path / "in", *prompt], "neither run.json nor model_index.json in .*in; expected the folder of a run"),
        ([tmp_path / "odd", *prompt], "holds a LTXPipeline; expected"),
        ([tmp_path / "next", *prompt], "next holds a WanPipeline of two transformers; expected"),
        ([tmp_path / "cut", *prompt], "cut does not load"),
        ([unfinished, *prompt], "no run.json in"),
        ([broken, *prompt], "run.json is not JSON"),
        ([damaged, *prompt], "minianyflow.json is not JSON"),
        ([run], "give either --prompt TEXT ... or --prompts FILE"),
        ([run, *prompt, "--prompts", tmp_path / "empty.txt"], "give either --prompt"),
        ([run, "--prompts", tmp_path / "empty.txt"], "no prompts in .*empty.txt"),
        ([run, "--prompts", tmp_path / "latin.txt"], r"latin.txt \(not UTF-8\)"),
        ([run, "--prompts", tmp_path / "nothing.txt"], r"nothing.txt \(No such file"),
        ([run, "--prompt", " "], "no prompts in the list"),
        ([run, *prompt, "--steps", "4", "0"], "0 steps; expected whole numbers, at least 1"),
        ([run, *prompt, "--steps", "four"], "invalid int value: 'four'; see minianyflow sample --help"),
        ([run, *prompt, "--frames", "16"], "frames 16; expected 4 n \\+ 1"),
        ([run, *prompt, "--frames", "-3"], "frames -3; expected 4 n"),
        ([run, *prompt, "--height", "40"], "height 40; expected a multiple of 32: .* patches of 4"),
        ([run, *prompt, "--frames", "9", "--width", "40"], "width 40; expected a multiple of 16: .* patches of 2"),
        ([runs / "bidirectional", *prompt, "--width", "40"], "width 40; expected a multiple of 16"),
        ([run, *prompt, "--length", "0"], "length 0; expected 1 to 100000 tokens"),
        ([run, *prompt, "--height", "10000000"], "expected at most 16384, which the model has places for"),
        ([run, *prompt, "--seed", "9" * 16], "expected a whole number of at most 15 digits"),
        ([run, *prompt, "--steps", "9" * 20], "expected whole numbers, at least 1, at most 100000"),
        ([run, *prompt, *video, *image], "both --image and --video"),
        ([run, *prompt, "--context", "5"], "--context without --video"),
        ([run, *prompt, *video, "--context", "4"], "context 4; expected 4 n \\+ 1"),
        ([run, *prompt, *video, "--context", "5"], "a start of 5 frames; expected 1 or 9, where a chunk ends"),
        ([run, *prompt, *video, "--context", "17"], "a start of 17 frames in a clip of 17; expected fewer"),
        ([run, *prompt, *video, "--frames", "9"], "a start of 9 frames in a clip of 9"),
        ([runs / "bidirectional", *prompt, *image, "--frames", "1"], "a start of 1 frames in a clip of 1"),
        ([run, *prompt, *video, "--frames", "33", "--context", "25"], "x-0.mp4 is too short .17 frames .* at least 25"),
        ([run, *prompt, "--video", tmp_path / "no.mp4"], "no file .*no.mp4"),
        ([run, *prompt, "--image", tmp_path / "empty.txt"], "empty.txt cannot be read"),
    ):
        refused(capsys, sampling, [*arguments, *out], message)
    if not torch.cuda.is_available():
        refused(capsys, sampling, [run, *prompt, "--device", "cuda", *out], "torch finds no GPU here")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lacks_a_part_is_one_line(exported, tmp_path, capsys):
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        lacking = shutil.copytree(exported / "causal", tmp_path / part)
        shutil.rmtree(lacking / part) if (lacking / part).is_dir() else (lacking / part).unlink()
        refused(capsys, sampling, [lacking, "--prompt", "x", "--output", tmp_path / "out"], part)


def test_released_weights_come_with_a_word_on_their_notes(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        sampling(["--help"])
    assert "commercial licence" in " ".join(capsys.readouterr().out.split())  # it may break at the hyphen
    monkeypatch.setattr("minianyflow.wan.sources.identify", lambda name: (Config(base=name), {}))

    def load(*arguments, **options):
        raise InputError("as far as this goes")

    monkeypatch.setattr("minianyflow.wan.sources.load_transformer", load)
    run_main(sampling, ["nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "--prompt", "x"])
    assert "non-commercial licence" in capsys.readouterr().err
