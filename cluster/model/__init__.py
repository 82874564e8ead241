"""Open, slice and run models. Only this package knows MLX and mlx-lm.

The input is a checkpoint folder. The outputs are its shape (``model_shape``), a runnable stage (``stage``) and its
tokenizer (``tokenizer``). Read the modules in the order in which a model is opened: ``checkpoint`` (JSON and headers,
no MLX), ``skeleton`` (mlx-lm's own model, weights not read), ``trace`` (analysis of its graph), ``slice`` (runs some of
the layers), ``stage`` (frames in, frames out). It knows nothing of networks, workers or requests.

Importing this package does not import MLX: the checkpoint module also runs on machines that never run a model.
"""

from cluster.model.import_changes import change_imports

change_imports()
