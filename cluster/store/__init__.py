"""The store: fetches the bytes of this Mac's slice of a model, and only those, and verifies them.

**Identity.** A model is identified by its fingerprint (config, tokenizer, headers: ``cluster.model.checkpoint``) and
its *manifest*: the SHA-256 of each tensor (``digest_manifest``). Headers alone give the fingerprint. The manifest grows
as tensors are hashed. Macs that hold different bytes of one tensor never serve together.

**Location.** A complete folder stays where it is: the user's own folder, or the Hugging Face cache. A part of a model
is a *partial checkpoint* (``partial_checkpoint``) in ``MACPIPE_HOME/models/FINGERPRINT``. It has all small files, and
each safetensors file at its full length with its real header; the file is sparse, with only the needed ranges filled.
mlx-lm opens it like any folder. A journal beside it (``append_log``) records which ranges are present and which tensors
are verified, so that a process that was killed continues where it stopped. If a file's size or modification time
differs from the recorded one, its tensors are hashed again.

**Sources** (``fetch``), in order: a folder on this Mac; peers that have the bytes (``peer_client``: the coordinator's
folder and other workers; ``store_server`` is their side); the hub (``hub``: range requests through huggingface_hub). If
several workers need a tensor, the first of them fetches it and the others copy it from there, so each tensor is
downloaded from the internet once. Each complete tensor is hashed and compared with the manifest, if that has its
digest. Each complete file is compared with the hub's own hash.

The room needs no MLX: the caller names the tensors of a slice (``cluster.model.tensor_map``). Its calls block; daemons
run them on threads. It knows nothing of plans or loads.
"""
