"""Weights on disk: Orbax and safetensors, read and written a layer at a time."""
