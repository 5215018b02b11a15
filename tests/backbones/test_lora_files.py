"""LoRA files made elsewhere: every spelling of keys, alpha wherever it is said, and refusals that name the key."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.backbones import lora_families, lora_layouts
from diffalign.backbones.families import BY_NAME
from diffalign.backbones.lora_factors import Factors, divide, join
from diffalign.backbones.lora_files import Lora, LoraFile, find_file
from diffalign.backbones.lora_keys import Keys
from diffalign.errors import ModelError

FLUX = BY_NAME["flux"].layer_names()
Q = "transformer_blocks.0.attn.to_q"


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pair(stem, ends=("lora_A.weight", "lora_B.weight"), rows=8, rank=2):
    return {f"{stem}.{ends[0]}": _random(rank, 8, seed=1), f"{stem}.{ends[1]}": _random(rows, rank, seed=2)}


def _file(path, tensors, **metadata):
    save_file(tensors, path, metadata=metadata or None)
    return LoraFile(path)


KOHYA = ("lora_down.weight", "lora_up.weight")


@pytest.mark.parametrize(
    ("stem", "ends", "layout"),
    [
        (f"transformer.{Q}", ("lora_A.weight", "lora_B.weight"), "diffusers"),
        (f"transformer.{Q}", KOHYA, "diffusers"),
        (f"base_model.model.{Q}", ("lora_A.weight", "lora_B.weight"), "peft"),
        (f"base_model.model.transformer.{Q}", ("lora_A.default.weight", "lora_B.default.weight"), "peft"),
        (f"diffusion_model.{Q}", ("lora_A.weight", "lora_B.weight"), "comfy"),
        (f"model.diffusion_model.{Q}", KOHYA, "comfy"),
        (f"lora_transformer_{Q.replace('.', '_')}", KOHYA, "kohya"),
        (f"lora_unet_{Q.replace('.', '_')}", KOHYA, "kohya"),
        (f"lycoris_{Q.replace('.', '_')}", KOHYA, "kohya"),
        (Q, ("lora_A.default.weight", "lora_B.default.weight"), "no prefix"),
    ],
)
def test_every_spelling_means_the_same_layer(tmp_path, stem, ends, layout):
    file = _file(tmp_path / "x.safetensors", _pair(stem, ends))
    assert file.layout == layout
    lora = file.read(FLUX, "flux")
    assert lora.layers.keys() == {Q}
    assert torch.equal(lora.layers[Q].down, _random(2, 8, seed=1))
    assert torch.equal(lora.layers[Q].up, _random(8, 2, seed=2))


def test_the_spelling_of_diffusers_before_peft(tmp_path):
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor"
    tensors = {}
    for name in ("to_q", "to_out"):
        tensors[f"{stem}.{name}_lora.down.weight"] = _random(2, 8)
        tensors[f"{stem}.{name}_lora.up.weight"] = _random(8, 2)
    lora = _file(tmp_path / "x.safetensors", tensors).read(BY_NAME["sd15"].layer_names(), "sd15")
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert lora.layers.keys() == {f"{block}.to_q", f"{block}.to_out.0"}


class TestAlpha:
    def _alpha(self, file):
        return file.read(FLUX, "flux").layers[Q].alpha

    def test_of_a_tensor_in_bfloat16(self, tmp_path):
        tensors = _pair(f"diffusion_model.{Q}", KOHYA) | {f"diffusion_model.{Q}.alpha": torch.tensor(0.5).bfloat16()}
        assert self._alpha(_file(tmp_path / "x.safetensors", tensors)) == 0.5

    def test_of_diffusers_metadata_with_patterns(self, tmp_path):
        said = {"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"^" + Q: 3}}
        file = _file(tmp_path / "x.safetensors", _pair(f"transformer.{Q}"), lora_adapter_metadata=json.dumps(said))
        assert self._alpha(file) == 3
        said.pop("transformer.alpha_pattern")
        file = _file(tmp_path / "y.safetensors", _pair(f"transformer.{Q}"), lora_adapter_metadata=json.dumps(said))
        assert self._alpha(file) == 6

    def test_of_pefts_configuration_beside_the_file(self, tmp_path):
        save_file(_pair(f"base_model.model.{Q}"), tmp_path / "adapter_model.safetensors")
        config = {"r": 2, "lora_alpha": 6, "use_rslora": True}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert self._alpha(LoraFile(find_file(tmp_path))) == pytest.approx(6 * 2**0.5)  # alpha / sqrt(rank)

    def test_without_a_word_it_is_the_rank_and_that_is_said(self, tmp_path):
        lora = _file(tmp_path / "x.safetensors", _pair(f"transformer.{Q}")).read(FLUX, "flux")
        assert lora.layers[Q].scale == 1
        assert "no alpha" in lora.notes[0]

    @pytest.mark.parametrize("layout", lora_layouts.LAYOUTS)
    def test_ranks_and_alphas_that_differ_survive(self, tmp_path, layout):
        names = [
            f"transformer_blocks.{block}.attn.{part}" for block in (1, 11) for part in ("to_q", "to_k", "add_v_proj")
        ]
        layers = {
            name: Factors(_random(rank, 8, seed=rank), _random(8, rank, seed=9), alpha)
            for name, rank, alpha in zip(names, (1, 2, 4, 8, 2, 2), (1.0, 2.0, 0.3, 16.0, 2.0, 5.0), strict=True)
        }
        file = lora_layouts.write(Lora(layers), layout, tmp_path / "x.safetensors", FLUX, "transformer")
        again = LoraFile(file).read(FLUX, "flux").layers
        assert again.keys() == layers.keys()
        for name, entry in layers.items():
            found = again[name]
            torch.testing.assert_close(found.scale * found.up @ found.down, entry.scale * entry.up @ entry.down)


class TestFactors:
    def _update(self, factors):
        return factors.scale * factors.up @ factors.down

    def _part(self, rows, rank, alpha, seed):
        return Factors(_random(rank, 8, seed=seed), _random(rows, rank, seed=seed + 100), alpha)

    @pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2), (3,)])
    @pytest.mark.parametrize("scales", [(2.0,) * 4, (1.0, 0.7, 3.0, 0.1)])
    def test_joined_parts_are_those_parts(self, present, scales):
        shares = (1, 1, 1, 4)
        parts = [
            self._part(5 * share, 3, 3 * scale, seed) if seed in present else None
            for seed, (share, scale) in enumerate(zip(shares, scales, strict=True))
        ]
        whole = join(parts, shares)
        assert whole.rank == 3 * len(present)
        rows = [
            torch.zeros(5 * share, 8) if part is None else self._update(part)
            for part, share in zip(parts, shares, strict=True)
        ]
        torch.testing.assert_close(self._update(whole), torch.cat(rows), rtol=1e-6, atol=1e-6)
        divided = divide(whole, shares)
        assert [part is None for part in divided] == [part is None for part in parts]
        if len(set(scales)) == 1:
            for part, found in zip(parts, divided, strict=True):
                if part is not None:
                    assert torch.equal(part.up, found.up)
                    assert torch.equal(part.down, found.down)
                    assert part.alpha == found.alpha

    def test_parts_that_never_left_zero_keep_their_rank(self):
        parts = [Factors(_random(2, 8, seed=seed), torch.zeros(5, 2), 2.0) for seed in range(3)]
        divided = divide(join(parts, (1, 1, 1)), (1, 1, 1))
        assert all(torch.equal(a.down, b.down) for a, b in zip(parts, divided, strict=True))

    def test_a_fused_layer_gives_all_of_down_to_each_part(self):
        whole = self._part(21, 4, 2.0, 0)
        parts = divide(whole, (1, 1, 1))
        assert all(torch.equal(part.down, whole.down) and part.alpha == 2.0 for part in parts)
        torch.testing.assert_close(torch.cat([self._update(part) for part in parts]), self._update(whole))
        again = join(parts, (1, 1, 1))
        assert torch.equal(again.up, whole.up)
        assert torch.equal(again.down, whole.down)

    def test_rows_that_cannot_be_divided_are_refused(self):
        with pytest.raises(ModelError, match="20 rows"):
            divide(self._part(20, 4, 2.0, 0), (1, 1, 1))


class TestTextEncoders:
    CLIP = "text_model.encoder.layers.3.self_attn.q_proj"

    @pytest.mark.parametrize(
        ("stem", "ends"),
        [
            (f"lora_te1_{CLIP.replace('.', '_')}", KOHYA),
            (f"text_encoder.{CLIP}", ("lora_A.weight", "lora_B.weight")),
            (f"text_encoder.{CLIP.removeprefix('text_model.')}", ("lora_A.weight", "lora_B.weight")),
            (
                f"text_encoder.{CLIP.replace('q_proj', 'to_q')}_lora.down.weight".removesuffix("_lora.down.weight"),
                KOHYA,
            ),
            (f"text_encoders.clip_l.transformer.{CLIP}", KOHYA),
        ],
    )
    def test_those_of_clip_are_carried(self, tmp_path, stem, ends):
        file = _file(tmp_path / "x.safetensors", _pair(f"transformer.{Q}") | _pair(stem, ends))
        lora = file.read(FLUX, "flux")
        assert lora.text.keys() == {"text_encoder"}
        assert lora.text["text_encoder"].keys() == {self.CLIP}
        for layout, start in (
            ("diffusers", "text_encoder.text_model."),
            ("kohya", "lora_te1_text_model_"),
            ("comfy", "text_encoders.clip_l.transformer.text_model."),
        ):
            written = lora_layouts.write(lora, layout, tmp_path / f"{layout}.safetensors", FLUX, "transformer")
            assert any(key.startswith(start) for key in load_file(written))
            assert LoraFile(written).read(FLUX, "flux").text["text_encoder"].keys() == {self.CLIP}

    @pytest.mark.parametrize(
        "stem", ["lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder.model.layers.0.self_attn.q_proj"]
    )
    def test_t5_and_language_models_are_refused_by_name_unless_left_out(self, tmp_path, stem):
        file = _file(tmp_path / "x.safetensors", _pair(f"transformer.{Q}") | _pair(stem, KOHYA))
        with pytest.raises(ModelError, match=rf"{stem}.*--without-text-encoders"):
            file.read(FLUX, "flux")
        lora = file.read(FLUX, "flux", text=False)
        assert not lora.text
        assert "left out" in lora.notes[-1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "words"),
        [
            (f"transformer.{Q}.dora_scale", "a DoRA"),
            ("lora_unet_img_in.hada_w1_a", "LoHa"),
            ("lora_unet_img_in.lokr_w1", "LoKr"),
            (f"transformer.{Q}.lora_B.bias", "biases"),
            ("diffusion_model.img_in.diff_b", "whole weights"),
            ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
            ("model.weight", "no tensor of a LoRA"),
        ],
    )
    def test_what_no_two_factors_say(self, tmp_path, key, words):
        with pytest.raises(ModelError, match=rf'holds "{key}": .*{words}'):
            _file(tmp_path / "x.safetensors", _pair(f"transformer.{Q}") | {key: torch.zeros(2)})

    def test_a_key_that_nobody_knows_with_the_nearest(self, tmp_path):
        tensors = _pair(f"transformer.{Q}") | _pair("lora_unet_double_blocks_4_img_atn_qkv", KOHYA)
        file = _file(tmp_path / "x.safetensors", tensors)
        with pytest.raises(ModelError, match=r'1 of the 2 layers.*Did you mean "double_blocks_4_img_attn_qkv"'):
            file.read(FLUX, "flux")
        with pytest.raises(ModelError, match=r"nearest \(flux\).*lora_unet_double_blocks_4_img_atn_qkv"):
            lora_families.guess(file)

    def test_names_that_several_families_share(self, tmp_path):
        with pytest.raises(ModelError, match="several families share: sd3, flux"):
            lora_families.guess(_file(tmp_path / "x.safetensors", _pair(f"transformer.{Q}")))

    def test_half_a_layer(self, tmp_path):
        tensors = _pair(f"transformer.{Q}")
        tensors.pop(f"transformer.{Q}.lora_B.weight")
        with pytest.raises(ModelError, match="not its up factor"):
            _file(tmp_path / "x.safetensors", tensors)

    def test_factors_of_unlike_rank(self, tmp_path):
        tensors = _pair(f"transformer.{Q}") | {f"transformer.{Q}.lora_B.weight": torch.zeros(8, 3)}
        with pytest.raises(ModelError, match=r"do not fit: \[2, 8\] and \[8, 3\]"):
            _file(tmp_path / "x.safetensors", tensors).read(FLUX, "flux")

    def test_a_layer_under_two_names(self, tmp_path):
        tensors = _pair(f"transformer.{Q}") | _pair("lora_unet_double_blocks_0_img_attn_qkv", KOHYA, rows=24)
        with pytest.raises(ModelError, match="twice"):
            _file(tmp_path / "x.safetensors", tensors).read(FLUX, "flux")


def test_keys_of_unets_tell_nothing_of_dots_within_names():
    keys = Keys.of(["lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "lora_unet_input_blocks_4_1_proj_in.alpha"])
    (place,) = keys.layers
    assert (place.name, place.flat, keys.layers[place].keys()) == ("input_blocks_4_1_proj_in", True, {"down", "alpha"})
