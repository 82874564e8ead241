"""The store: how a Mac comes to the bytes of its slice and to no others, and how it knows that they are the right ones.

**Identity.** A model is its fingerprint (config, tokenizer, headers: ``cluster.model.checkpoint``)
and its *manifest*: what each tensor's bytes hash to (``manifest``). The fingerprint is known from headers alone; the
manifest fills up as tensors are seen, and Macs that hold different bytes of one tensor are never served together.

**Where bytes are.** A whole folder stays where it is: the person's own, or the Hugging Face cache. A part of a model is
a *partial checkpoint* (``partial``), ``MACPIPE_HOME/models/FINGERPRINT``: all small files, and each safetensors file at
its full length with its real header, sparse, with only the needed ranges filled. mlx-lm opens it like any folder. A
journal beside it (``journal``) says which ranges came and which tensors were verified, so that whoever is killed goes
on where it stopped; once a file's size or time is not what was noted last, its tensors are hashed again.

**How bytes come** (``fetch``): from a folder of this Mac's own; else from peers that have them (``peer``: the
coordinator's folder, other workers; ``shelf`` is their side); else from the hub (``hub``: range requests, through
huggingface_hub). A tensor that several workers need is fetched by the first of them, and the others take it from there:
the internet is asked once. Each tensor is hashed once it is complete, against the manifest where that knows it, and
each file of which all bytes came against the hub's own hash.

The room needs no MLX: which tensors a slice is made of is told to it (``cluster.model.tensor_map``). It blocks, and
daemons run it on threads. It knows nothing of plans or loads.
"""
