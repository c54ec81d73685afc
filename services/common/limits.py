"""The bounds of everything a caller may ask for, whatever the model: one place, known to both sides of a wire.

A model's own limits may be narrower (`services.common.models_file`), never wider.
"""

MAX_LAYERS = 32
MIN_SIDE, MAX_SIDE = 16, 2048
# About 1,000 English words: far above any text encoder's window, far below what hurts a regular expression.
MAX_PROMPT_CHARACTERS = 4000
MAX_TEXT_CHARACTERS = 300
# gRPC's default message limit is 4 MiB; a picture above this goes through PutBlob.
MAX_INLINE_BYTES = 1024 * 1024
MAX_BLOB_BYTES = 64 * 1024 * 1024
# A plate of 2048 x 2048 with 32 layers at latent factor 4 is 50 MiB; each control picture in it, one a kind, adds 12.
MAX_PLATE_BYTES = 160 * 1024 * 1024
# Control kinds are a handful.
MAX_STRUCTURES = 8
MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
MAX_IMAGES = 16
# Previews are kept in the job's log, up to some 100 kB each.
MAX_PREVIEWS = 512
MAX_FEATHER = 64.0
# Clicks that say which object of a picture is meant.
MAX_POINTS = 32
MAX_ADAPTERS = 8
MAX_ADAPTER_WEIGHT = 2.0
# Vectors of one learned word: each takes a token of the prompt.
MAX_VECTORS = 8
