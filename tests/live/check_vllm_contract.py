"""The installed vLLM has all that portax uses of it, as portax uses it; each thing that has changed is a line.

python tests/live/check_vllm_contract.py     (in an environment with vLLM; exit code 1 if something has changed)
"""

import dataclasses
import importlib
import inspect
import json
import os
import sys

import vllm_cases

TRANSFER = "vllm.distributed.weight_transfer"
RELOAD = "vllm.model_executor.model_loader.reload"
CALLS = {
    f"{TRANSFER}.factory:WeightTransferEngineFactory.register_engine": ["name", "module_path_or_cls", "class_name"],
    f"{TRANSFER}.base:WeightTransferEngine.__init__": ["self", "config", "vllm_config", "device", "model"],
    f"{TRANSFER}.base:WeightTransferEngine.init_transfer_engine": ["self", "init_info"],
    f"{TRANSFER}.base:WeightTransferEngine.start_weight_update": ["self"],
    f"{TRANSFER}.base:WeightTransferEngine.receive_weights": ["self", "update_info"],
    f"{TRANSFER}.base:WeightTransferEngine.finish_weight_update": ["self"],
    f"{TRANSFER}.base:WeightTransferEngine.shutdown": ["self"],
    f"{RELOAD}.layerwise:initialize_layerwise_reload": ["model"],
    f"{RELOAD}.layerwise:finalize_layerwise_reload": ["args", "kwargs"],
    f"{RELOAD}.layerwise:get_layerwise_info": ["layer"],
    f"{RELOAD}.layerwise:_place_kernel_tensors": ["layer", "info"],
    f"{RELOAD}.layerwise:_get_weight_loader": ["tensor"],
    f"{RELOAD}.layerwise:_get_original_loader": ["tensor"],
    f"{RELOAD}.meta:restore_layer_on_meta": ["layer", "info"],
    f"{RELOAD}.utils:get_layer_params_buffers": ["layer"],
    f"{RELOAD}.utils:get_tensor_load_numel": ["tensor"],
    "vllm:LLM.init_weight_transfer_engine": ["self", "request"],
    "vllm:LLM.start_weight_update": ["self"],
    "vllm:LLM.update_weights": ["self", "request"],
    "vllm:LLM.finish_weight_update": ["self", "weight_version"],
    "vllm:LLM.get_weight_version": ["self"],
    "vllm:LLM.reset_prefix_cache": ["self", "reset_running_requests", "reset_connector"],
    "vllm:LLM.sleep": ["self", "level", "mode"],
    "vllm:LLM.wake_up": ["self", "tags"],
}
ABSTRACT = {
    f"{TRANSFER}.base:WeightTransferEngine": {
        "init_transfer_engine", "start_weight_update", "receive_weights", "finish_weight_update", "shutdown"
    },
    f"{TRANSFER}.base:WeightSource": {"metadata", "__iter__"},
}  # fmt: skip
FIELDS = {
    f"{TRANSFER}.base:ParamMeta": ["name", "dtype", "shape"],
    f"{TRANSFER}.base:WeightTransferInitInfo": [],
    f"{TRANSFER}.base:WeightTransferUpdateInfo": [],
    f"{RELOAD}.types:LayerReloadingInfo": [
        "restore_metadata", "restore_device", "load_numel", "load_numel_total", "loaded_weights", "kernel_tensors",
        "kernel_non_persistent_buffers",
    ],
}  # fmt: skip


def found(where):
    """The thing at `module:name.name`."""
    module, _, path = where.partition(":")
    thing = importlib.import_module(module)
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def drift():
    """Everything that has changed."""
    for where, expected in CALLS.items():
        yield where, expected, lambda thing: list(inspect.signature(thing).parameters)
    for where, expected in ABSTRACT.items():
        yield where, expected, lambda thing: set(thing.__abstractmethods__)
    for where, expected in FIELDS.items():
        yield where, expected, lambda thing: [field.name for field in dataclasses.fields(thing)]


def changed():
    """Whether nothing has."""
    passed = True
    for where, expected, read in drift():
        try:
            now = read(found(where))
        except (AttributeError, ImportError) as error:
            now = f"{type(error).__name__}: {error}"
        if now != expected:
            passed = False
            sys.stdout.write(f"FAILED: {where}: found {now}; expected {expected}\n")
    return not passed


def source():
    """Whether vLLM's own grouping takes a `WeightSource` of every golden that has a hub form, tensor by tensor."""
    from vllm.distributed.weight_transfer.base import layerwise_groups

    import portax
    from portax.integrations.vllm import WeightSource
    from portax.testing.golden import Tree

    passed = True
    for name in ("qwen3-8b.scan", "qwen3-30b-a3b.scan", "gemma4-26b.scan", "qwen3-next-80b-a3b.scan"):
        tree = Tree.load(vllm_cases.GOLDEN / name / "source.json")
        params = tree.fill()
        converter = portax.converter_for(tree.config, layout=portax.layouts.HuggingFace())
        made = WeightSource(converter, lambda params=params: params, bucket_bytes=2**18)
        declared = {meta.name: (meta.dtype, meta.shape) for meta in made.metadata()}
        groups = [names for names, _ in made.iter_groups()]
        sent = {name: (leaf.dtype, tuple(leaf.shape)) for name, leaf in made}
        equal = groups == layerwise_groups(list(declared)) and sent == declared and list(sent) == list(declared)
        passed &= equal
        sys.stdout.write(f"{'passed' if equal else 'FAILED'}: {name}: {len(sent)} tensors in {len(groups)} groups\n")
    return passed


if __name__ == "__main__":
    drifted = changed()
    sys.stdout.write(json.dumps({"calls": len(CALLS), "classes": len(ABSTRACT) + len(FIELDS)}) + "\n")
    passed = source() and not drifted
    sys.stdout.flush()
    os._exit(0 if passed else 1)
