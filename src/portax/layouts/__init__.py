"""Layouts: the ways in which engines hold weights, one file for each engine contract."""

from portax.layouts.base import Layout, Tensor
from portax.layouts.canonical import Canonical
from portax.layouts.flax_nnx import FlaxNnx
from portax.layouts.huggingface import HuggingFace
from portax.layouts.maxtext_vllm import MaxTextVllm
from portax.layouts.native_model import NativeModel
from portax.layouts.quantization import Quantization
from portax.layouts.tpu_inference import TpuInference

__all__ = [
    "Canonical",
    "FlaxNnx",
    "HuggingFace",
    "Layout",
    "MaxTextVllm",
    "NativeModel",
    "Quantization",
    "Tensor",
    "TpuInference",
]
