"""What tests of weights in files share: small checkpoints, folders, and the command line."""

import dataclasses
import json

import torch
from safetensors.torch import save_file

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.convert import to_released
from launch import convert
from launch.checkpoint.store import CheckpointStore
from launch.tokenizer import ByteTokenizer, FileTokenizer, train_bpe
from tests.launch.runs import save_tensors

LINEAR = TNLConfig(vocab_size=320, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)
CONFIGS = {
    "linear": LINEAR,
    "learned": dataclasses.replace(LINEAR, decay="learned"),
    "hybrid": dataclasses.replace(LINEAR, layer_types="LSL", num_key_value_heads=2),
}
TEXTS = [
    "def main():\n    return 1\n",
    "caf\u00e9 \u00fcber \u4e2d\u6587 \U0001f600 a\u0301",
    "\ufeff\r\n\t \x00\x01\x7f\u00a0\u2028 two  spaces   three",
    "<|end_of_document|> and <|padding|> as text",
    "",
]


def bpe():
    return train_bpe([text * 3 for text in TEXTS] + ["line 1 of 2: a main return"], 300)


def file_tokenizer():
    """One of another origin, which puts a token before each text."""
    description = bpe().spec()["tokenizer"]
    for token, name in zip(description["added_tokens"], ("</s>", "<pad>"), strict=True):
        del description["model"]["vocab"][token["content"]]
        description["model"]["vocab"][name] = token["id"]
        token["content"] = name
    start = [
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": start,
        "pair": [*start, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
    }
    return FileTokenizer(description, "</s>", "<pad>")


TOKENIZERS = {"byte": ByteTokenizer, "bpe": bpe, "file": file_tokenizer}


def weights_of(config, seed=0):
    torch.manual_seed(seed)
    model = TNL(config)
    for name, weight in model.named_parameters():
        if "decay_proj" in name:
            torch.nn.init.normal_(weight)
    return model.state_dict()


def checkpoint_of(folder, config=LINEAR, tokenizer="byte", weights=None):
    """A checkpoint as training saves it; its folder."""
    state = {
        "family": "tnl",
        "model": dataclasses.asdict(config),
        "tokenizer": None if tokenizer is None else TOKENIZERS[tokenizer]().spec(),
    }
    tensors = {"model": weights_of(config) if weights is None else weights, "optimizer": {}}
    save_tensors(CheckpointStore(folder), 4, tensors, state)
    return folder


def run(*arguments):
    """The exit code of a command line."""
    return convert.main([str(argument) for argument in arguments])


def export(checkpoint, output, *options):
    assert run("export", "--checkpoint", checkpoint, "--output", output, *options) == 0
    return output


def bring_in(folder, output):
    assert run("import", "--input", folder, "--output", output) == 0
    return output


def truncate(path):
    """Cut a file off after two thirds."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


RELEASED = {
    "model_type": "transnormer",
    "architectures": ["TransnormerForCausalLM"],
    "decoder_embed_dim": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "hidden_dim": 32,
    "glu_dim": 48,
    "vocab_size": 320,
    "linear_act_fun": "swish",
    "linear_use_lrpe_list": [1, 0, 0],
    "no_scale_embedding": False,
    "init_std": 0.2,
    "pad_token_id": 0,
}


def write_released(folder, dtype=torch.bfloat16, kind="safetensors", files=1):
    """A folder in the released layout; its tensors."""
    folder.mkdir()
    weights = weights_of(LINEAR)
    weights["embedding.weight"][7, 0] = torch.nan
    tensors = to_released(weights, LINEAR)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if kind == "safetensors":
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(RELEASED))
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    weight_map = {}
    for number in range(files):
        end = "" if files == 1 else f"-{number + 1:05}-of-{files:05}"
        part = {name: tensors[name] for name in list(tensors)[number::files]}
        path = folder / f"{stem}{end}{suffix}"
        if kind == "safetensors":
            save_file(part, path)
        else:
            torch.save(part, path)
        weight_map |= dict.fromkeys(part, path.name)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return tensors
