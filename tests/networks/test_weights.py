"""Trained networks as files: they come back whole, or one line says why not."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minianyflow.networks import weights
from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.codec import Codec
from minianyflow.networks.dense import Dense, FromClean
from minianyflow.networks.wan import TINY, WanNetwork, tiny_transformer
from minianyflow.networks.weights import describe, load_codec, load_into, load_network, read_weights, save_weights
from tests.networks.inputs import PROMPT, R, T, clip, tiny_causal
from tests.refused import refused

COST = {"forwards": 3, "backwards": 1, "seconds": 0.5}
MADE = {"command": "make weights", "seeds": [0], "cost": COST, "figures": {"sliced_w2": 0.25}}


def wan(**changes):
    return WanNetwork(tiny_transformer(**{"num_layers": 1} | changes))


@pytest.fixture
def kept(tmp_path):
    """A small network and the file that keeps it."""
    network, path = wan(), tmp_path / "student.safetensors"
    save_weights(path, network.state_dict(), describe(network) | MADE)
    return network, path


NETWORKS = {
    "wan": wan,
    "another size": lambda: wan(num_layers=2, patch_size=(1, 4, 4), gate_value=0.5),
    "causal": lambda: CausalNetwork(tiny_causal()),
    "other chunks": lambda: CausalNetwork(tiny_causal(), 2, 3),
    "dense": lambda: FromClean(Dense(8, 4, 1, clip(5).shape[1:], PROMPT.shape[1:])),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back(tmp_path, name):
    network, path = NETWORKS[name](), tmp_path / "student.safetensors"
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    save_weights(path, network.state_dict(), describe(network) | MADE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student.json", "student.safetensors"]
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # others may read the weights too
    before = torch.get_rng_state()
    again = load_network(path)
    assert torch.equal(before, torch.get_rng_state())  # loading draws no random numbers
    assert (type(again), again.training) == (type(network), False)
    assert json.dumps(describe(again)) == json.dumps(describe(network))
    assert not any(weight.requires_grad for weight in again.parameters())
    z = clip(getattr(network, "first", 5))
    with torch.no_grad():
        assert torch.equal(again(z, T, R, PROMPT), network(z, T, R, PROMPT))


def test_a_codec_comes_back_with_its_scale(tmp_path):
    torch.manual_seed(0)
    codec, path = Codec().eval(), tmp_path / "codec.safetensors"
    codec.normalise(torch.rand(2, 5, 16, 16))
    codec.load_state_dict({name: value.half().float() for name, value in codec.state_dict().items()})
    save_weights(path, codec.state_dict(), describe(codec) | MADE)
    again, video = load_codec(path), torch.rand(2, 9, 16, 16)
    assert list(again.vae.config.latents_mean) == list(codec.vae.config.latents_mean) != [0.0] * 4
    assert list(again.vae.config.latents_std) == list(codec.vae.config.latents_std)
    assert torch.equal(again.encode(video), codec.encode(video))
    latents = torch.randn(2, 3, 4, 4, 4)
    assert torch.equal(again.decode(latents), codec.decode(latents))


def test_the_provenance_says_where_it_is_from(kept):
    _, path = kept
    state, config, provenance = read_weights(path, "wan")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert config["num_layers"] == 1
    assert config["ffn_dim"] == TINY["ffn_dim"]
    assert not any(name.startswith("_") for name in config)
    assert MADE.items() <= provenance.items()
    assert set(provenance["versions"]) == {"torch", "diffusers"}
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == provenance["format"] == "minianyflow 1"
    path.with_suffix(".json").unlink()
    assert read_weights(path, "wan")[2] == {}  # weights do without


def test_integers_stay_as_they_are_and_shared_weights_are_no_obstacle(tmp_path):
    shared, path = torch.arange(6.0).half().view(2, 3), tmp_path / "mixed.safetensors"
    state = {"one": shared, "same": shared, "low": shared.to(torch.bfloat16), "turned": shared.T}
    save_weights(path, state | {"count": torch.tensor([70_000])}, {"kind": "wan", "config": {}} | MADE)
    again = read_weights(path, "wan")[0]
    assert (again["count"].dtype, again["count"].tolist()) == (torch.int64, [70_000])
    assert all(torch.equal(again[name], shared.float()) for name in ("one", "same", "low"))
    assert torch.equal(again["turned"], shared.T.float())


def test_what_is_not_whole_is_not_written(kept, monkeypatch):
    network, path = kept
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    made = describe(network) | MADE

    def full(*arguments):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("minianyflow.networks.weights.save", full)
    with refused("No space left"):
        save_weights(path, network.state_dict(), made)
    monkeypatch.undo()
    state = network.state_dict() | {"transformer.proj_out.bias": torch.full((16,), 1e5)}
    with refused(r"proj_out\.bias is not finite in half precision"):
        save_weights(path, state, made)
    with refused("is not finite"):
        save_weights(path, {"one": torch.tensor([torch.nan])}, made)
    with refused("weights without seeds, cost; expected kind"):
        save_weights(path, {}, {name: value for name, value in made.items() if name not in ("seeds", "cost")})
    with refused("nothing is ever unpickled"):
        save_weights(path.with_suffix(".pt"), {}, made)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("left", [0, 5, 100, 4000, -1])
def test_a_truncated_file_says_how_many_bytes(kept, left):
    _, path = kept
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with refused(f"student.safetensors, {len(whole[:left])} bytes, is cut short"):
        load_network(path)


def test_a_file_that_is_something_else_is_named(kept, tmp_path):
    network, path = kept
    with refused(r"no weights teacher\.safetensors in .*; those there are: student$"):
        load_network(tmp_path / "teacher.safetensors")
    with refused("those there are: none"):
        load_network(tmp_path / "nowhere/student.safetensors")
    with refused("kind 'wan'; expected 'codec'"):
        load_codec(path)
    with refused("kind 'wan'; expected 'codec' or 'causal'"):
        read_weights(path, "codec", "causal")
    path.with_suffix(".json").write_text('{"command": ')
    with refused(r"student\.json is not JSON"):
        read_weights(path, "wan")
    path.write_bytes(b"\x40\0\0\0\0\0\0\0not json" * 100)
    with refused("1600 bytes, is cut short or no safetensors file"):
        load_network(path)
    save_file(network.state_dict(), path)
    with refused("has format 'unknown'; expected 'minianyflow 1'"):
        load_network(path)
    save_file(network.state_dict(), path, {"format": "minianyflow 2", "kind": "wan", "config": "{}"})
    with refused("has format 'minianyflow 2'; expected 'minianyflow 1'"):
        load_network(path)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name in ("weights.pt", "weights.bin", "weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with refused("unpickled" if name != "weights.safetensors" else "no safetensors file"):
            load_network(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_weights_that_do_not_fit_are_named():
    state = wan().state_dict()
    with refused(r"file has for transformer\.proj_out\.weight \(16, 64\); expected \(64, 64\): not the weights"):
        wide = {"transformer.patch_embedding.weight": torch.zeros(64, 4, 1, 4, 4)}
        load_into(wan(patch_size=(1, 4, 4)), state | wide, "file")
    with refused(r"transformer\.blocks\.1\..* no weights; expected .* \(27 do not fit\)"):
        load_into(wan(num_layers=2), state, "file")
    with refused(r"for extra \(1,\); expected none of that name: .* \(1 do not fit\)"):
        load_into(wan(), state | {"extra": torch.zeros(1)}, "file")


def test_what_cannot_be_rebuilt_is_one_line(tmp_path):
    with refused("a Linear; expected a WanNetwork"):
        describe(torch.nn.Linear(1, 1))
    path = tmp_path / "odd.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "minianyflow 1", "kind": "wan", "config": '{"colour": 1}'})
    with refused("does not say how to build what it holds"):
        load_network(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "minianyflow 1"})
    with refused("expected 'minianyflow 1': make it again"):
        load_network(path)


def test_a_fingerprint_is_of_what_a_folder_holds_and_not_of_its_place(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "a/transformer")
    before = weights.fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a/transformer", tmp_path / "b")
    assert weights.fingerprint(tmp_path / "b") == before  # elsewhere, and a transformer's own folder
    (file,) = (tmp_path / "b").glob("*.safetensors")
    state = load_file(file)
    names = sorted(state)
    for part in range(2):  # the same tensors, in two files
        save_file({name: state[name] for name in names[part::2]}, tmp_path / f"b/part-{part}.safetensors")
    file.unlink()
    assert weights.fingerprint(tmp_path / "b") == before
    name = max(names, key=lambda name: state[name].numel())
    for change in (state[name] + 1e-6, state[name].half(), state[name].flatten()):
        save_file({name: change}, tmp_path / "b/part-9.safetensors")  # read last
        assert weights.fingerprint(tmp_path / "b") != before
    (tmp_path / "b/part-9.safetensors").unlink()
    place = tmp_path / "b/config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"_diffusers_version": "0", "transformers_version": "0"}))
    assert weights.fingerprint(tmp_path / "b") == before
    place.write_text(json.dumps(config | {"eps": 1}))
    assert weights.fingerprint(tmp_path / "b") != before
    assert weights.fingerprint("owner/model") == "owner/model"
    (tmp_path / "b/part-0.safetensors").write_bytes(b"cut")
    with refused(r"the weights in .*b cannot be read \(.*\); fetch or make them again"):
        weights.fingerprint(tmp_path / "b")


def test_a_dense_network_takes_clips_of_one_size():
    with refused(r"latents \(2, 9, 4, 4, 4\); expected \(B, 5, 4, 4, 4\): a dense network takes clips of one size"):
        NETWORKS["dense"]()(clip(9), T, R, PROMPT)
