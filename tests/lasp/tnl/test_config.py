"""Presets, parameter and FLOP counts, refused configs."""

import pytest
import torch

from lasp.tnl import TNL, TNLConfig


# 1b: the released checkpoint holds 2.04 GB of bfloat16, which is this many parameters.
@pytest.mark.parametrize(
    ("name", "expected"),
    [("385m", 398_984_192), ("1b", 1_020_266_496), ("7b", 6_836_719_616)],
)
def test_presets_count_their_parameters(name, expected):
    config = TNLConfig.preset(name)
    with torch.device("meta"):
        model = TNL(config)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert config.num_parameters() == expected
    assert config.head_dim == 128


def test_parameter_count_follows_the_fields():
    config = TNLConfig.preset("tiny", num_layers=3, lrpe_layers=(0, 2), glu_dim=100)
    model = TNL(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


def test_a_learned_decay_is_counted():
    shape = dict(layer_types="LLS", num_layers=3)
    learned, fixed = (
        TNLConfig.preset("tiny", **shape, decay=each) for each in ("learned", "fixed")
    )
    assert sum(p.numel() for p in TNL(learned).parameters()) == learned.num_parameters()
    # Two linear layers of 4 heads, from 128 values and a bias.
    assert learned.num_parameters() - fixed.num_parameters() == 2 * 4 * (128 + 1)
    assert learned.flops_per_token() - fixed.flops_per_token() == 3 * 2 * (2 * 4 * 128)


def test_flops_by_hand():
    config = TNLConfig(vocab_size=10, dim=4, num_layers=2, num_heads=2, glu_dim=6)
    matrices = 10 * 4 + 2 * (4 * 16 + 4 * 4 + 3 * 4 * 6)
    # Two heads of D = 2; the key dimension is 4 in layer 0 and 2 in layer 1.
    attention = 2 * (2 * 4 * 2 + 2 * 4 * 2) + 2 * (2 * 2 * 2 + 2 * 2 * 2)
    assert config.flops_per_token(training=False) == 2 * matrices + attention
    assert config.flops_per_token() == 3 * (2 * matrices + attention)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 100, "num_heads": 8}, "does not divide"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dim": 128.0}, "whole number"),
        ({"activation": "relu"}, "'relu'"),
        ({"decay": "learnt"}, 'decay is \'learnt\': it must be "fixed", "learned", "per_head" or'),
        ({"position_embeddings": -1}, "position_embeddings is -1"),
        ({"denominator": True}, "denominator is set"),
        ({"lrpe_layers": (24,)}, "num_layers - 1 = 23"),
        ({"lrpe_layers": (1, 1)}, "at most once"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"pad_token_id": 64000}, "below vocab_size"),
        ({"num_heads": 4}, "a head has 256 values"),
    ],
)
def test_bad_configs_are_refused_with_value_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        TNLConfig(**fields)


def test_preset_refuses_unknown_names():
    with pytest.raises(ValueError, match="choose one of tiny, 385m, 1b, 7b"):
        TNLConfig.preset("2b")
    with pytest.raises(ValueError, match="n_layers"):
        TNLConfig.preset("1b", n_layers=3)


def test_config_from_lists_is_hashable_and_equal():
    assert hash(TNLConfig(lrpe_layers=[0])) == hash(TNLConfig())
