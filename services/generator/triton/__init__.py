"""The stages on NVIDIA Triton: `stages` and `servers` ask, `wire` is how it crosses, `host` and `model` answer."""
