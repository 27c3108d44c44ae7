"""Loading and saving BAGEL: what comes back is what was written, and a bad folder gives one clear error."""

import json
import logging
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration
from trl_unigrpo.models.bagel.autoencoder import build_vae, official_names
from trl_unigrpo.models.bagel.vision import UNDERSTANDING_MODULES


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "bagel", copy_function=shutil.copyfile))


def edit_weights(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same_model(actual: BagelForUnifiedGeneration, expected: BagelForUnifiedGeneration) -> None:
    assert type(actual) is type(expected)
    for own, other in ((actual, expected), (actual.codec.vae, expected.codec.vae)):
        states = own.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert actual.config.llm_config.to_dict() == expected.config.llm_config.to_dict()
    assert actual.config.vit_config.to_dict() == expected.config.vit_config.to_dict()
    for name in (*BagelConfig.__annotations__, "pixels_per_token", "latent_channels"):
        if name not in ("llm_config", "vit_config", "sub_configs"):
            assert getattr(actual.config, name) == getattr(expected.config, name), name
    assert actual.generation_config.eos_token_id == expected.generation_config.eos_token_id == 376


def test_saved_model_comes_back(model, tmp_path):
    with torch.no_grad():
        model.llm2vae.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert_same_model(BagelForUnifiedGeneration.from_pretrained(tmp_path), model)


def test_saved_model_keeps_changed_settings(model, tmp_path):
    model.config.think_system_prompt = None
    model.config.timestep_shift = 3.0
    model.save_pretrained(tmp_path)
    loaded = BagelForUnifiedGeneration.from_pretrained(tmp_path)
    assert loaded.default_system_prompt is None
    assert loaded.config.timestep_shift == 3.0


def test_saved_vae_is_the_released_file(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path)
    written, released = (load_file(folder / "ae.safetensors") for folder in (tmp_path, checkpoint))
    assert written.keys() == released.keys()
    assert all(torch.equal(written[name], released[name]) for name in released)


def test_auto_classes_load_both_layouts(model, checkpoint, tmp_path):
    assert_same_model(AutoModelForCausalLM.from_pretrained(checkpoint), model)
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    for source in (checkpoint, tmp_path):
        config = AutoConfig.from_pretrained(source)
        assert isinstance(config, BagelConfig)
        assert config.llm_config.hidden_size == 64
        assert config.im_start_token_id == 375


def test_dtype_is_the_callers_choice(checkpoint, model, tmp_path):
    half = BagelForUnifiedGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.codec.vae.dtype == torch.float32
    half.save_pretrained(tmp_path)
    assert BagelForUnifiedGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16
    back = BagelForUnifiedGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16().float())


def test_released_folder_without_config_json(checkpoint, folder, model):
    (folder / "config.json").unlink()
    config = BagelConfig.from_pretrained(folder)
    assert config.llm_config.num_hidden_layers == model.config.llm_config.num_hidden_layers
    assert config.im_start_token_id == model.config.im_start_token_id
    assert config.vae_config["ch"] == 128  # the released VAE, whose sizes are in no file
    assert (config.pixels_per_token, config.latent_channels) == (16, 64)


def test_released_folder_that_nests_its_configurations(folder, model):
    """The released `config.json` may hold the other files' entries, and the VAE's in part."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("llm_config", "vit_config"):
        config[name] = json.loads((folder / f"{name}.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_model(BagelForUnifiedGeneration.from_pretrained(folder), model)
    for name in ("llm_config", "vit_config"):
        (folder / f"{name}.json").unlink()
    assert_same_model(BagelForUnifiedGeneration.from_pretrained(folder), model)
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder), model)
    config["vae_config"] = {"z_channels": 16, "downsample": 8}
    (folder / "config.json").write_text(json.dumps(config))
    assert BagelConfig.from_pretrained(folder).vae_config["ch_mult"] == [1, 2, 4, 4]


def test_saved_weights_have_the_released_keys(model, checkpoint, tmp_path):
    """Also after a second round: the tower's count of layers is not reduced twice."""
    released = load_file(checkpoint / "ema.safetensors")
    for round in ("first", "second"):
        model.save_pretrained(tmp_path / round)
        (file,) = (tmp_path / round).glob("[!a]*.safetensors")
        written = load_file(file)
        assert written.keys() == released.keys()
        assert all(torch.equal(written[name], released[name]) for name in released)
        config = json.loads((tmp_path / round / "config.json").read_text())
        assert config["vit_config"]["num_hidden_layers"] == 3
        model = BagelForUnifiedGeneration.from_pretrained(tmp_path / round)
        assert len(model.vit_model.vision_model.encoder.layers) == 2


def remove_tower(folder: Path) -> None:
    edit_weights(
        folder / "ema.safetensors",
        lambda w: [w.pop(name) for name in list(w) if name.startswith(UNDERSTANDING_MODULES)],
    )


def test_checkpoint_without_tower_loads_for_painting_and_says_so_once(folder, model, recorded, caplog, tmp_path):
    remove_tower(folder)
    logging.getLogger("transformers").addHandler(caplog.handler)
    with pytest.warns(UserWarning, match="no understanding tower.*can't read images.*complete checkpoint") as caught:
        loaded, info = BagelForUnifiedGeneration.from_pretrained(folder, output_loading_info=True)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert len(caught) == 1 and not caplog.records
    assert not info["missing_keys"]
    assert loaded.vit_model is loaded.connector is loaded.vit_pos_embed is loaded.config.vit_config is None
    ids = recorded["prefill/input_ids"][None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="can't read images"):
        loaded.embed_vit_image(recorded["und/pixel_values"])
    loaded.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = BagelForUnifiedGeneration.from_pretrained(tmp_path / "saved")
    assert again.state_dict().keys() == loaded.state_dict().keys()


def test_missing_vae_is_named_when_it_is_needed(folder, recorded):
    (folder / "ae.safetensors").unlink()
    model = BagelForUnifiedGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"no VAE: put `ae\.safetensors` into the folder"):
        model.decode_latents(recorded["rollout/final"][None], (64, 96))
    with pytest.raises(ValueError, match=r"no VAE: put `ae\.safetensors` into the folder"):
        model.encode_images(recorded["vae/pixel_values"])


def test_model_from_configuration_alone(model):
    """The flow head starts at zero, norms at one, positions at the sines and cosines they were trained with."""
    fresh = BagelForUnifiedGeneration(model.config)
    assert fresh.llm2vae.weight.count_nonzero() == 0
    assert (fresh.language_model.model.norm_moe_gen.weight == 1).all()
    # The recorded table is these values with noise of 0.05.
    difference = fresh.latent_pos_embed.pos_embed - model.latent_pos_embed.pos_embed
    assert difference.std().item() == pytest.approx(0.05, rel=0.02)


DAMAGES = {
    "missing key": (
        lambda folder: edit_weights(folder / "ema.safetensors", lambda w: w.pop("llm2vae.weight")),
        (ValueError, r"1 missing: llm2vae\.weight.*Check that the folder is complete"),
    ),
    "many missing keys": (
        lambda folder: edit_weights(
            folder / "ema.safetensors", lambda w: [w.pop(name) for name in list(w) if "moe_gen" in name]
        ),
        (ValueError, r"57 missing: language_model\S+_moe_gen.*and 51 more"),
    ),
    "extra key": (
        lambda folder: edit_weights(folder / "ema.safetensors", lambda w: w.update(surplus=torch.ones(2))),
        (ValueError, r"1 left over: surplus\. Check"),
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder / "ema.safetensors", lambda w: w.update({"llm2vae.bias": torch.ones(2)})),
        (ValueError, r"1 of another shape: llm2vae\.bias \(2,\) instead of \(64,\)"),
    ),
    "part of the tower": (
        lambda folder: edit_weights(
            folder / "ema.safetensors",
            lambda w: [w.pop(name) for name in list(w) if name.startswith(("connector.", "vit_pos_embed."))],
        ),
        (ValueError, r"5 missing: connector\.fc1\.bias.*vit_pos_embed\.pos_embed\. Check that the folder"),
    ),
    "tower of another depth": (
        lambda folder: edit_json(folder / "vit_config.json", num_hidden_layers=2),
        (ValueError, r"16 left over: vit_model.*put the `vit_config\.json` of these weights into the folder"),
    ),
    "tower of another width": (
        lambda folder: edit_json(folder / "vit_config.json", intermediate_size=64),
        (ValueError, r"6 of another shape: vit_model\S+fc1\.bias \(112,\) instead of \(64,\).*Check"),
    ),
    "table of another side": (
        lambda folder: edit_json(folder / "config.json", vit_max_num_patch_per_side=40),
        (ValueError, r"1 of another shape: vit_pos_embed\.pos_embed \(4900, 64\) instead of \(1600, 64\)"),
    ),
    "no vit_config.json": (
        lambda folder: (folder / "vit_config.json").unlink(),
        (ValueError, r"42 left over: connector.*put the `vit_config\.json` of these weights into the folder"),
    ),
    "wrong vocabulary": (
        lambda folder: edit_json(folder / "llm_config.json", vocab_size=600),
        (ValueError, r"weights have a vocabulary of 512, the configuration of 600: correct `vocab_size`"),
    ),
    "no tokenizer_config.json": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        (FileNotFoundError, r"bagel' has no `tokenizer_config\.json`.*Download the checkpoint again"),
    ),
    "no llm_config.json": (
        lambda folder: (folder / "llm_config.json").unlink(),
        (FileNotFoundError, r"not a BAGEL checkpoint: expected `llm_config\.json`.*Pass the folder"),
    ),
    "broken json": (
        lambda folder: (folder / "llm_config.json").write_text("{"),
        (ValueError, r"llm_config\.json is not valid JSON.*again"),
    ),
    "truncated weights": (
        lambda folder: (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:100_000]),
        (OSError, r"bagel' is damaged or incomplete.*Download it again"),
    ),
    "git-lfs pointer": (
        lambda folder: (folder / "ema.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        (OSError, r"bagel' is damaged or incomplete.*git-lfs"),
    ),
    "no weights": (
        lambda folder: (folder / "ema.safetensors").unlink(),
        (FileNotFoundError, r"bagel' has no `ema\.safetensors`.*Download the checkpoint again"),
    ),
    "truncated VAE": (
        lambda folder: (folder / "ae.safetensors").write_bytes((folder / "ae.safetensors").read_bytes()[:100_000]),
        (OSError, r"damaged or incomplete.*Download it again"),
    ),
    "VAE with other keys": (
        lambda folder: edit_weights(
            folder / "ae.safetensors", lambda w: w.update(surplus=w.pop("decoder.conv_in.bias"))
        ),
        (ValueError, r"missing: decoder\.conv_in\.bias; left over: surplus\. Check"),
    ),
    "VAE of another size": (
        lambda folder: edit_weights(
            folder / "ae.safetensors", lambda w: w.update({"decoder.conv_in.bias": torch.ones(2)})
        ),
        (ValueError, r"of another size: decoder\.conv_in\.bias\. Check"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_gives_one_clear_error(folder, damage):
    break_it, (error, message) = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(error, match=message):
        BagelForUnifiedGeneration.from_pretrained(folder)


def test_checkpoint_of_another_size_than_its_configuration(folder):
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"28 left over: language_model\.model\.layers\.3\."):
        BagelForUnifiedGeneration.from_pretrained(folder)


def test_model_and_vae_have_the_released_keys_and_shapes(checkpoint):
    released = {"model": Counter(), "VAE": Counter()}
    for line in (checkpoint.parent / "released_keys.txt").read_text().splitlines():
        name, shape, count = re.fullmatch(r"(\S+) \((.*)\) x(\d+)", line).groups()
        shape = tuple(int(side) for side in shape.split(",") if side.strip())
        released["VAE" if name.startswith(("encoder.", "decoder.")) else "model"][name, shape] = int(count)
    assert {kind: counter.total() for kind, counter in released.items()} == {"model": 1223, "VAE": 244}
    llm_config = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vit_config = {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    config = BagelConfig(llm_config=llm_config, vit_config=vit_config)
    with torch.device("meta"):
        model, vae = BagelForUnifiedGeneration(config), build_vae(config.vae_config)
    names = official_names(vae)
    stored = {names[name]: tensor for name, tensor in vae.state_dict().items()}

    def counted(shapes: dict[str, tuple[int, ...]]) -> Counter:
        return Counter((re.sub(r"\.\d+(?=\.)", ".{i}", name), shape) for name, shape in shapes.items())

    assert counted({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}) == released["model"]
    # The VAE's attention is linear here and made of 1 x 1 convolutions there.
    sizes = Counter()
    for (name, shape), count in released["VAE"].items():
        sizes[name, (math.prod(shape),)] += count
    assert counted({name: (tensor.numel(),) for name, tensor in stored.items()}) == sizes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 14_607_260_128
