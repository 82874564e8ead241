"""The model room: everything that knows MLX and mlx-lm, and nothing else in the tree does.

A checkpoint folder goes in; what comes out is its shape (``survey``), a running run of its layers (``stage``), and its
tokenizer (``tokenizer``). The way to read it is the way a model is opened: ``checkpoint`` (JSON and headers, no MLX),
``skeleton`` (mlx-lm's own model, nothing read), ``trace`` (what its graph says), ``slice`` (ghosts and the outlet),
``stage`` (frames in, frames out). It knows nothing of networks, workers or requests.

Importing this package imports no MLX: the checkpoint module has to work where no model ever runs.
"""

from cluster.model.import_limits import keep_limits_on_import

keep_limits_on_import()
