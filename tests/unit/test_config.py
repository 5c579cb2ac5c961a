"""Reading the published config.json; every bad field is named."""

import json
from pathlib import Path

import pytest

import stepmoe as sm

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
PUBLISHED = json.loads((TINY / "config.json").read_text())


def test_the_published_layout_is_read():
    config = sm.Step3p5Config.from_pretrained(TINY)
    assert config == sm.Step3p5Config.from_pretrained(TINY / "config.json")
    assert config.moe_layers == (1, 2, 3)
    assert config.num_attention_heads_sliding == 12
    assert config.swiglu_limits == (None, None, None, 0.5)
    assert config.eos_token_ids == (1,)


def test_entries_of_the_prediction_layers_are_ignored():
    longer = dict(PUBLISHED, num_nextn_predict_layers=3, moe_layers_enum="1,2,3,4,5,6")
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits"):
        longer[name] = PUBLISHED[name] + PUBLISHED[name][:3]
    assert sm.Step3p5Config.from_dict(longer) == sm.Step3p5Config.from_dict(PUBLISHED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"moe_router_activation": "softmax"}, "'softmax'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": -64}, "hidden_size must be .* got -64"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4"),
        ({"layer_types": ["linear"] * 4}, "'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"moe_layers_enum": "a,b"}, "'a,b'"),
        ({"torch_dtype": "float99"}, "'float99' is not one a model runs in"),
        ({"num_hidden_layers": "5"}, "num_hidden_layers .* got '5'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor, original_max"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0, got -1"),
        ({"rope_theta": 0}, "rope_theta must be"),
        ({"moe_layers_enum": "1,1,2"}, "names a layer twice"),
        ({"moe_top_k": True}, "num_experts_per_tok must be .* got True"),
        ({"moe_top_k": 17}, "top-17 .* got 16"),
        ({"num_attention_heads": 9}, "9 query heads .* 4 key-value"),
        ({"partial_rotary_factors": [0.2] * 4}, "0.2 of head_dim 16"),
        ({"partial_rotary_factors": "x"}, "partial_rotary_factors must be a number .* got 'x'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number above 0, got None"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be .* got 'x'"),
        ({"moe_router_scaling_factor": []}, r"router_scaling_factor must be .* got \[\]"),
        ({"rope_theta": float("inf")}, "rope_theta must be .* got inf"),
        ({"rope_scaling": "x"}, "rope_scaling must be an object .* got 'x'"),
        ({"attention_other_setting": "x"}, "attention_other_setting must be an object"),
        ({"quantization_config": "x"}, "quantization_config must be an object"),
        ({"moe_layers_enum": 3}, "moe_layers_enum = 3 is not a list"),
        ({"moe_layers_enum": [1, None]}, r"moe_layers_enum = \[1, None\] is not a list"),
        ({"yarn_only_types": 3}, "yarn_only_types must be a list .* got 3"),
        ({"swiglu_limits": ["x"] * 4}, "swiglu_limits must be a number .* got 'x'"),
        ({"swiglu_limits": -1}, "swiglu_limits must be a number above 0, got -1"),
        ({"swiglu_limits_shared": float("nan")}, "swiglu_limits_shared must be .* got nan"),
        ({"eos_token_id": "x"}, "eos_token_id must be a whole number .* got 'x'"),
        ({"eos_token_id": [1, 1.5]}, "eos_token_id must be .* got 1.5"),
        ({"bos_token_id": "x"}, "bos_token_id must be .* got 'x'"),
        ({"norm_expert_weight": "x"}, "norm_topk_prob must be true or false, got 'x'"),
        *(
            ({"rope_scaling": PUBLISHED["rope_scaling"] | {name: value}}, f"{name} .*{value!r}")
            for name, value in [
                ("factor", 0),
                ("factor", "x"),
                ("original_max_position_embeddings", -1),
                ("low_freq_factor", 64),
            ]
        ),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(sm.ConfigError, match=message):
        sm.Step3p5Config.from_dict({**PUBLISHED, **changes})


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(sm.ConfigError, match=r"no config\.json"):
        sm.Step3p5Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(sm.ConfigError, match="not valid JSON"):
        sm.Step3p5Config.from_pretrained(tmp_path)


def test_a_layer_that_does_not_exist():
    with pytest.raises(sm.ConfigError, match=r"layer 5 does not exist: .* 0 to 4"):
        sm.Step3p5Config.tiny().layer(5)


def test_a_config_that_is_no_object_and_one_that_is_no_text(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[1]")
    with pytest.raises(sm.ConfigError, match="must hold an object, got list"):
        sm.Step3p5Config.from_pretrained(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(sm.ConfigError, match="not valid JSON"):
        sm.Step3p5Config.from_pretrained(file)
