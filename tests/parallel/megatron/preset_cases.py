"""Models of published shapes that the ranks run, with weights that hf_weights has converted."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from parallel.megatron.hf_weights import load_weights
from parallel.megatron.presets import from_hf_config, from_hf_folder
from tests.parallel.megatron.cases import set_up_groups, sizes_here
from tests.parallel.megatron.hybrid_cases import save


def build(folder):
    """This stage of the model of a Hugging Face folder."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    parallel = dict(
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else tp,
        sequence_parallel=tp > 1,
    )
    preset = from_hf_folder(folder, megatron=sizes_here() | parallel)
    return preset.gpt_model(max_sequence_length=64)


def ends_of_virtual_chunks(sizes, hf):
    """(has an embedding, has an output layer) of both chunks of a virtual pipeline of two."""
    set_up_groups(*sizes)
    preset = from_hf_config(hf, megatron=sizes_here())
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    try:
        chunks = [preset.gpt_model(64, vp_stage=stage) for stage in range(2)]
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    return [(hasattr(each, "embedding"), hasattr(each, "output_layer")) for each in chunks]


def outputs(sizes, folder, checkpoint, tokens):
    """(logits [B, T, V] of the model and of its MTP layers, by layer its attention's input and
    output [T, B, d])."""
    set_up_groups(*sizes)
    model = build(folder).eval()
    load_weights(model, checkpoint)
    logits, attention = [], {}

    def keep_attention(layer):
        def hook(module, args, kwargs, output):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            # What follows may write into them.
            attention[layer.layer_number - 1] = hidden.clone(), output[0].clone()

        return hook

    for layer in model.decoder.layers:
        layer.self_attention.register_forward_hook(keep_attention(layer), with_kwargs=True)
    model.output_layer.register_forward_hook(
        lambda module, args, output: logits.append(output[0].clone())
    )
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        # Without labels, Megatron computes no MTP layers.
        model(tokens, positions, None, labels=tokens)
    logits = [gather_from_tensor_model_parallel_region(x).transpose(0, 1) for x in logits]
    # The model's own logits come last.
    return logits[-1:] + logits[:-1], attention


def reshard(sizes, folder, checkpoint, output):
    """Load a checkpoint at some parallel sizes, and save what was loaded."""
    import multiprocessing

    # Megatron writes in processes, and daemons may not start any.
    multiprocessing.current_process()._config["daemon"] = False
    set_up_groups(*sizes)
    model = build(folder)
    load_weights(model, checkpoint)
    save(model, output)
