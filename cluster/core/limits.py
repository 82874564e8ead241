"""Bounds, sizes and deadlines that several rooms share or that users notice, each with its reason.

A number that matters to one module alone stands in that module; those of certificates, tokens and keys are in
``cluster.security.limits``.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# Sizes on the wire
MAX_FRAME_BYTES: Final = 256 * MIB
"""LONG_PREFILL_CHUNK tokens x 16,384 wide in bf16 are 64 MiB; three boundary tensors of that fit with room."""
MAX_FRAME_HEADER_BYTES: Final = 4 * MIB
"""The grammars of joins take up to half of it; token ids of a chunk (2 KiB), other edits and timings are small."""
BULK_BYTES: Final = 64 * KIB
"""A prefill frame with larger tensors sends them on the bulk line; below, a second message costs more than it saves."""
MAX_TENSORS: Final = 16
"""A boundary value is one to three arrays in every architecture of mlx-lm."""
MAX_TENSOR_RANK: Final = 8
MAX_STAGES: Final = 64
MAX_BODIES_WAITING: Final = 2 * MAX_STAGES
"""Bodies on the bulk line that arrived before their heads. The prefill window (stages + 1) keeps it below."""
MAX_WAITING_BYTES: Final = GIB
"""Bytes of all frames in one queue of the data plane. A reader so far behind is given up to protect memory. The window
of 64 stages with chunks of 16 MiB has this size."""
MAX_JOINED_BYTES: Final = 2 * MIB
"""Grammars in the joins of one frame, half of a header. A single grammar may have the full length."""
MAX_HEADER_ELEMENTS: Final = 64 * KIB
"""Values in a frame's header, nested ones included: 4 MiB of empty lists take 1.5 s and 300 MiB. The sequences of a
lane with all alternatives have 17,000."""
MAX_JOINED_ELEMENTS: Final = MAX_HEADER_ELEMENTS // 2
"""Values in the joins of one frame: the maximal biases of eleven requests."""
MAX_MARKER_TOKENS: Final = 64
"""Tokens of the marker that ends a model's reasoning; the longest known has five."""
MAX_EDITS: Final = 4096
"""Edits of one frame: enough to free every sequence and every prefix."""
MAX_ROWS: Final = 256
"""Sequences in one lane."""
MAX_CONTROL_BYTES: Final = 16 * MIB
"""Size of a control or public message: the longest prompt in four-byte characters."""
MAX_FACT_CHARS: Final = 256
"""Length of a name, a version or a chip that a worker reports."""
MAX_PATH_CHARS: Final = 4096
"""Length of a model's name or folder that a coordinator sends: the longest path of any system."""
MAX_SENTENCE_CHARS: Final = 4096
"""Length of a worker's problem, which is shown to people."""
MAX_ANSWER_BYTES: Final = 256 * KIB
"""Size of a worker's answer to its coordinator; a heartbeat's has 4 KiB. This many bytes of empty messages are parsed
in 5 ms; 16 MiB of them took the event loop 1.5 s."""
MAX_ENGINE_MESSAGE_BYTES: Final = MIB
"""Size of a message between a daemon and its engine. Paths and error sentences are the longest content."""

# What a request may ask for
MAX_PROMPT_BYTES: Final = 4 * MIB
"""Size of a prompt in UTF-8: about a million tokens of context."""
MAX_BYTES_PER_TOKEN: Final = 128
"""A prompt of more bytes per token of the context does not fit. Text has 3 to 5, blanks alone have 128."""
MAX_MESSAGES: Final = 4096
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_LOGIT_BIAS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_PROMPT_LOGPROBS: Final = 64 * KIB
"""Log-probabilities of prompts in one answer, alternatives and copies for samples included: 2 MiB of JSON."""
PROMPT_PIECE_TOKENS: Final = 64
"""Prompt tokens whose log-probabilities are encoded at a stretch: with all alternatives, 5 to 10 ms."""
MAX_SCORED_LOGITS: Final = 32 * MIB
"""Logits of a prefill step that reports log-probabilities: 128 MiB in float32. Its chunk is shortened to this: with a
vocabulary of 152,000 tokens it has 220."""
SCORED_SLICE_LOGITS: Final = 4 * MIB
"""Logits whose log-probabilities are computed at once. With alternatives, each takes several times its own bytes."""
LEAST_REPETITION_PENALTY: Final = 0.01
"""Logits are divided by it; near zero they would overflow. In practice nobody asks for less than a half."""
MOST_REPETITION_PENALTY: Final = 10.0
MAX_REQUEST_ID_CHARS: Final = 128
MAX_SAMPLES: Final = 32
"""Answers of one prompt in one request: as many as one lane can decode together."""
MAX_TOOLS: Final = 256
MAX_TOOL_NAME_CHARS: Final = 128
MAX_READ_CALLS: Final = 256
"""Tool calls between two markers of an answer; with more, the text is content."""
SMALL_CALL_CHARS: Final = 512
"""Text of tool calls that is read at once; the slowest parser takes 3 ms for as much. More is read in the sandbox."""
SMALL_TOOLS_CHARS: Final = 64 * KIB
"""Schemas of tools that are parsed at once for such calls: a millisecond."""
MAX_TEMPLATE_CHARS: Final = 64 * KIB
"""Length of additional chat template arguments, as JSON."""
MAX_SCHEMA_BYTES: Final = 64 * KIB
"""Size of a JSON schema, regex or Lark grammar without --max-schema-bytes, and of all tools' parameters together."""
MOST_SCHEMA_BYTES: Final = MIB
"""Largest value of --max-schema-bytes: a join with such a grammar leaves room for the rest of a frame's header."""
TOOL_CHECK_TIMEOUT_S: Final = 5.0
"""Time to find the tool whose schema breaks a request's grammar, by compiling each tool alone."""
MAX_INTAKE_BYTES: Final = 96 * MIB
"""Bytes of all requests being received or processed; one client gets at most half of them."""
MAX_COLLECTED_BYTES: Final = 40 * MIB
"""Bytes of one answer that is not streamed, with its request's body: less than a lone client's share."""
FREE_BODY_BYTES: Final = 64 * KIB
"""The first bytes of a body are not charged, so that ordinary requests pass while large ones fill the budget.
``MAX_CONNECTIONS`` of them are 128 MiB."""
SMALL_REQUEST_BYTES: Final = 8 * KIB
"""A request or a piece of one up to this is counted, parsed and checked on the event loop: a millisecond or two. With
more, 300 at once would keep the loop from taking up further calls, which gRPC cancels after 30 s."""
MAX_PARSING_WAITING: Final = 256
"""Requests that wait for the thread that parses; one more is refused with RESOURCE_EXHAUSTED. Each takes
10 to 50 ms."""
MAX_PROMPT_IDS: Final = MIB
"""Tokens of a prompt that is given as token ids."""
MAX_FIELDS: Final = 32 * KIB
"""Fields of one gRPC request, those of submessages included: 4,096 messages with one call each have 32,000."""
MAX_STAGE_FIELDS: Final = 320 * KIB
"""Fields of a request to load a stage, which lists its tensors: as many as fit a message, at 50 bytes each."""
MAX_STAGE_PEERS: Final = 256
"""Macs from which a stage's bytes may be fetched. Each is dialled; a coordinator lists the workers that it knows."""
DEFAULT_MAX_TOKENS: Final = 512
DEFAULT_MAX_CONTEXT: Final = 4096
"""Context without --max-context, if the model allows as much."""

# Scheduling
PREFILL_CHUNK: Final = 512
"""Tokens of a prefill frame: enough for matrix-matrix speed, few enough for stages to overlap."""
LONG_PREFILL_CHUNK: Final = 2048
"""Tokens of a prefill frame where that is measured to be better, as for a mixture of experts."""
LONG_CHUNK_S: Final = 2.0
"""Time that a prefill frame of more than PREFILL_CHUNK tokens may take of a stage: prompts that come meanwhile wait."""
LONG_CHUNK_MEMORY: Final = 0.05
"""Share of a sequence's cache bytes by which longer chunks may raise them. Sliding windows keep a whole last chunk."""
MAX_PREFILL_CHUNK: Final = 8192
"""Tokens of a prefill frame with --prefill-chunk; its tensors must fit in MAX_FRAME_BYTES as well."""
MAX_PRIORITY: Final = 9
MAX_QUEUE: Final = 256
"""Waiting samples. With one more, the client that holds most of them is refused with RESOURCE_EXHAUSTED."""
RETRY_AFTER_S: Final = 2.0
UNAVAILABLE_S: Final = 5.0
"""Retry delay for an unavailable service that names none: a load or a recovery takes seconds."""
MAX_UNREAD_EVENTS: Final = 1024
"""Token events of each sample that a client may leave unread, beyond gRPC's buffers, before SlowReader ends it."""
LANE_ROWS: Final = 32
"""Sequences that one lane decodes together at most; more would delay everyone's next token."""
MAX_PREFIXES: Final = 1024
"""Kept prefixes, however small. The edits that drop all of them fit one frame."""
PREFIX_SHARE: Final = 0.5
"""Share of a stage's cache memory for kept prefixes and marks. Live sequences take precedence."""
MAX_FORCED_TOKENS: Final = 16
"""Tokens that a grammar forces after a sample, as far as they are reported. No chain of guesses is longer, and to find
them takes as long as a mask, which is then needed once for so many tokens."""
DRAFT_AHEAD: Final = 8
"""Tokens that a draft model guesses beyond those that are needed now. It must be ahead of the ring's next lap."""
MAX_DRAFTS: Final = 16
"""Tokens that a draft model guesses in one step. Longer drafts are rarely right to their end."""
LOOKUP_TOKENS: Final = 64 * KIB
"""Tokens of a sequence in which its last tokens are looked up: 27 us for most texts, 0.5 ms for the worst."""
CLIENT_ANSWER_BYTES: Final = 256 * KIB
"""Earlier answers of one client from which its next ones are guessed: as many tokens as of the sequence itself."""
EARLIER_ANSWER_BYTES: Final = 64 * MIB
"""The same of all clients together."""
MAX_ANSWER_CLIENTS: Final = 1024
"""Clients whose earlier answers are kept."""
ANSWER_AGE_S: Final = 3600.0
"""An older answer is of another task, and is not kept in memory for longer than it is of use."""
MARK_TOKENS: Final = 512
"""A long prompt is marked at least this often at first; a chunk's end costs no frame of its own."""
MAX_SPLIT_POINTS: Final = 8
"""Lengths that a request names as likely ends of what later prompts share; each may cost a frame of its own."""
MAX_BORDERS: Final = 128
"""Beginnings of messages, tools and sections that a request names. As many of them are marked as cost little."""
MAX_STEP_MS: Final = 100.0
"""Time that one prefill chunk may take of a stage while others wait for their next token, without --max-step-ms.
People just notice it, and it is four times as long as reading a stage's weights, which each chunk has to do."""
OCCUPANCY_S: Final = 30.0
"""Period over which bubble shares are reported."""

# Deadlines, in seconds
DISCOVERY_TIMEOUT_S: Final = 30.0
"""`serve` waits this long for its workers before it reports who is missing."""
DEFAULT_COORDINATOR_PORT: Final = 7700
CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_TIMEOUT_S: Final = 2.0
"""The same for a data stream to a peer whose stream just fell silent. A link of 100 ms needs half of it."""
CONTROL_TIMEOUT_S: Final = 10.0
"""Deadline of a control call that moves no weights."""
LOAD_STALL_S: Final = 120.0
"""A load without progress for this long has failed."""
FRAME_TIMEOUT_S: Final = 120.0
"""Deadline of a frame while the stages' speed is unknown: kernels are compiled first."""
FRAME_FLOOR_S: Final = 15.0
"""Minimal deadline of a frame, however fast earlier frames were: a Mac that swaps or is busy is slow, not dead."""
FRAME_SLACK: Final = 10.0
"""A frame may take this many times as long as the slowest recent frame."""
CANARY_TIMEOUT_S: Final = 120.0
"""The first token compiles kernels (42 s on one CUDA machine)."""
HEARTBEAT_S: Final = 0.5
"""Interval at which a coordinator asks its workers for their state, which also shows them that it is alive."""
SUSPECT_S: Final = 1.25
"""Silence after which a worker is suspect: two unanswered heartbeats."""
GONE_S: Final = 2.5
"""Silence after which a worker is gone. An answer takes 0.1 s over a slow link, so no link explains it."""
ASK_S: Final = 2 * GONE_S
"""How long a recovery waits for answers: after GONE_S of silence a worker is gone; the rest is for a busy machine."""
STATUS_ASK_S: Final = 1.0
"""How long `status` waits for answers before it shows the last known state. Monitors call it all the time."""
STATUS_VIEW_S: Final = 0.5
"""How long `status` waits for the engine loop's figures, which take a millisecond unless it is stuck."""
REMEMBER_S: Final = 600.0
"""How long `status` shows a worker that has left."""
MAX_DEPARTED: Final = 16
"""Departed workers that are shown; the oldest is forgotten first."""
MOVE_S: Final = 3600.0
"""How long a drain waits for its layers to be loaded elsewhere: 300 GB at 1 Gb/s. A load that stalls ends sooner."""
ENGINE_SILENCE_S: Final = 10.0
"""An engine that does not answer a report for this long is killed and started again."""
RETURN_S: Final = 5.0
"""How long recovery waits for a crashed engine before it uses a spare. A standby engine is there at once; a new one
takes one or two seconds."""
RECOVERY_WAIT_S: Final = 20.0
"""How long requests wait for a Mac to come back if too few are left. Then they end with an error."""
ENGINE_STEADY_S: Final = 5.0
"""An engine that has lived this long is restarted without a delay: it does not crash in a loop."""
STANDBY_AFTER_S: Final = 2.0
"""Delay before the next standby starts, so that a stage that is being loaded goes first."""
ENGINE_CRASHES: Final = 3
CRASHES_S: Final = 60.0
"""A worker that was lost ENGINE_CRASHES times in this period is not waited for: a spare takes over at once."""
RESTART_S: Final = GONE_S
"""A coordinator that is silent for this long has ended: another with its id is the same one after a restart."""
RESUME_S: Final = 600.0
"""How long a client may take to come back for the rest of its answer after its coordinator died."""
EPOCH_TRIES: Final = 4
"""Loads that are tried, each with a larger epoch, if workers hold newer epochs than this coordinator knew."""
ADOPTION_LOOKS: Final = 5
"""How often a restarted coordinator looks for the rest of the workers that hold its model."""
STEADY_S: Final = 3.0
"""A worker counts as back after it has been back for this long."""
DRAIN_RETRY_S: Final = 5.0
"""Interval of checks whether the layers of a draining worker can move elsewhere."""
RESUMED_TOKENS: Final = 256
"""Tokens of a resumed answer that are decoded in one step of the engine loop, between frames: 3 ms."""
MAX_REPLAYS: Final = 8
"""A request that loses this many rings without a token in between is ended: it may be the cause."""
RECOVERY_TRIES: Final = 8
"""A recovery that has failed this often, and for RECOVERY_WAIT_S, ends the waiting requests and goes on trying."""
RECOVERY_PAUSE_S: Final = 0.1
"""Pause between two attempts of a recovery. A standby engine needs as long to be there."""
DRAIN_S: Final = 15.0
"""Time that a stopping worker gives its coordinator to move its layers away, or its requests to end."""
REPORT_TIMEOUT_S: Final = 2.0
"""An engine reports at once, even while it computes. Below DESCRIBE_TIMEOUT_S, so that its daemon can report it."""
STOP_GRACE_S: Final = 1.5
"""Time that an engine gets to end before it is killed, within the daemon's three seconds."""
ENGINE_START_TIMEOUT_S: Final = 60.0
ENGINE_START_SILENCE_S: Final = 5.0
"""A later engine that gets no processor time for this long before it is ready is killed. Its files are cached, so that
it waits for nothing: it hangs, as a standby may do unnoticed."""
ENGINE_BACKOFF_S: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Delays between restarts of an engine that keeps dying; the last one repeats."""

# Overload: a slow machine is not a dead one
LAG_TICK_S: Final = 0.25
"""Interval at which a process measures how late its timers fire."""
LAG_WINDOW_S: Final = 15.0
"""Period of those measurements that counts; a busy machine is late repeatedly."""
LAG_FLOOR_S: Final = 0.05
"""Timers are late above this. On a machine that is not overloaded they are not."""
MAX_LAG_S: Final = 5.0
"""Upper limit of a measured lag: a machine that slept for an hour was not an hour late."""
LAG_STEPS: Final = 8
"""Wake-ups of threads and processes between a question and its answer; each may be late."""
OVERLOADED_S: Final = 0.25
"""A lag above this is shown to people, and an engine's silence is not counted meanwhile."""
SLOW_ANSWERS: Final = 8
SLOW_ANSWER_S: Final = 60.0
"""How long a slow answer is remembered, ..."""
FALSE_ALARM_S: Final = 300.0
"""... and a false alarm: recoveries on an overloaded machine take a minute each."""
PATIENCE_GROWTH: Final = 4.0
"""Each further false alarm multiplies a deadline by this. Each one costs a recovery, so few must suffice."""
MAX_PATIENCE: Final = 16.0
"""Upper limit of what false alarms multiply a deadline by."""
SILENT_BUSY_SHARE: Final = 0.1
"""An engine that is silent but computes counts as hung after ten times ENGINE_SILENCE_S."""

# gRPC keepalive: pings detect a stopped peer in two seconds instead of a minute.
KEEPALIVE_MS: Final = 500
KEEPALIVE_TIMEOUT_MS: Final = 1_500
CLIENT_KEEPALIVE_MS: Final = 2_000
CLIENT_KEEPALIVE_TIMEOUT_MS: Final = 10_000
"""Between clients and the coordinator: an answer is not given up because a Mac is busy for seconds."""
BULK_KEEPALIVE_MS: Final = 10_000
BULK_TIMEOUT_MS: Final = 60_000
"""On lines with megabytes, pings wait behind the data: 8 MiB take 7 s at 10 Mbit/s. The pulse stream detects cuts."""
RECONNECT_MS: Final = 1_000
"""Delay of the first reconnect to a worker; gRPC's own delays grow to two minutes."""
CONNECT_ATTEMPT_MS: Final = 3_000
"""Time limit of one attempt to connect. A cut network swallows it, and gRPC's own limit is 20 s."""
CONTROL_IDLE_MS: Final = 600_000
"""A gRPC connection without a call for this long is closed; a client opens another when it needs one."""
MAX_CALLS: Final = 1024
"""Concurrent calls on one gRPC connection: several times as many as may wait and run."""

# HTTP
MAX_BODY_BYTES: Final = 16 * MIB
"""Size of an HTTP body: the same as of a gRPC message."""
FREE_CHUNKS: Final = 256
"""Chunks of a body that may have any length; ..."""
MIN_CHUNK_BYTES: Final = 256
"""... and the mean length of its chunks beyond them. Clients send kilobytes; 16 MiB are 65,000 chunks at most."""
BODY_TIMEOUT_S: Final = 30.0
"""Time that a client gets to send a request's body."""
MAX_PROMPTS: Final = 64
"""Prompts in one completions request."""
MAX_ANSWERS: Final = 64
"""Answers to one request, over all of its prompts."""
STREAM_WRITE_TIMEOUT_S: Final = 30.0
"""A client whose connection accepts no bytes for this long is considered gone."""
STREAM_COMMENT_S: Final = 5.0
"""Interval of comments on a stream without events. Proxies and clients close silent streams, some after 10 s."""
IDLE_CONNECTION_S: Final = 75.0
"""How long a connection may wait for its next request; longer than SDKs keep one in their pools."""
HEADER_TIMEOUT_S: Final = 10.0
"""Time that a client gets for a TLS handshake, or to send a request's head, before its connection is closed."""
LINGER_S: Final = 2.0
"""How long the body of a refused request may keep arriving, so that the client sees the refusal; ..."""
CLOSE_S: Final = 5.0
"""... and when a connection is cut whose client accepts no bytes while it is being closed."""
PREFLIGHT_S: Final = 600.0
"""How long a browser may cache a preflight's answer."""
KEY_CHECK_S: Final = 1.0
"""Interval of checks whether keys with running answers were revoked. New requests are refused at once."""
MAX_CONNECTIONS: Final = 2048
"""Open HTTP connections; more than requests can wait, and fewer than ``OPEN_FILES``."""
MAX_PEERS: Final = 1024
"""Open connections of one gRPC port, unfinished handshakes included; a further connection is refused."""
HANDSHAKE_S: Final = 10.0
"""Time limit of a handshake on a gRPC port; gRPC's own is 120 s."""
OPEN_FILES: Final = 8192
"""Open files that a daemon asks for: all of its ports full, and its files. The default on macOS is 256."""
MAX_LISTED_TOKENS: Final = 262_144
"""Tokens of a text that are listed one by one; writing them serves a single client."""
JOIN_RETRY_S: Final = 2.0
"""Interval of retries if another program of this Mac, such as ``macpipe init``, uses the join port."""

# Prompts as text
WHOLE_PROMPT_BYTES: Final = 512 * KIB
"""A prompt of at most this size is tokenized as a whole, within the memory of one sandbox job. A longer one is first
counted in pieces, and refused if it certainly has too many tokens."""
MAX_RENDERED_CHARS: Final = 2 * MAX_PROMPT_BYTES
"""Length of a rendered conversation."""

# Tokenizers, checked before they are loaded. The largest known have 262,144 tokens, 7,000 of them added.
MAX_VOCABULARY: Final = 2_000_000
MAX_ADDED_TOKENS: Final = 32_768
"""Load time grows with their square: 400,000 take 87 s."""
MAX_TOKEN_CHARS: Final = 4096
"""Length of one token. The longest known are 256 blanks."""
MAX_CHAT_TEMPLATE_CHARS: Final = 512 * KIB
"""The largest known have 60 KiB."""

# Grammars on the last stage
MASK_LEXER_FUEL: Final = 50_000
"""llguidance's unit of lexer work for one token: 4 ms."""
MASK_PARSER_ITEMS: Final = 10_000
"""The parser's work for one token, for regular expressions and Lark. With the library's 50,000, one token can block
a stage for 350 ms."""
MASK_ROW_ITEMS: Final = 2_000
"""The parser's items after one byte. The cost of an ambiguous grammar grows up to its cube: 60 ms for one token at
2,000, over a second at 10,000."""
JSON_PARSER_ITEMS: Final = 100_000
"""The parser's items for one token of a JSON schema. After a comma any of the remaining optional properties may
follow, at four items each, once per token of blanks and a quote: 2,000 properties need 50,000 to 100,000."""
JSON_ROW_ITEMS: Final = 10_000
"""The same after one byte: 2,400 optional properties. A schema is unambiguous about where a value ends, so a row costs
at most its square: 2,000 properties take 15 to 40 ms for the token before a name, 2.5 ms on average."""
WALK_TOKENS: Final = 24
"""Length of a check's two walks through a grammar: too ambiguous grammars show within 20 tokens."""
WALK_CPU_S: Final = 0.2
"""CPU time of those tokens: 4 ms for each. The rest of ``SANDBOX_CPU_S`` is for compiling."""
GRAMMAR_WAIT_S: Final = 20.0
"""How long a request waits for its grammar at its first token; nobody else waits. ``MAX_STAGE_COMPILES`` of the
dearest grammars that a check lets through take two threads 16 s."""
GRAMMAR_POLL_S: Final = 0.005
"""How often the last stage is asked for samples that wait for a grammar, while no frame passes it anyway; ..."""
GRAMMAR_POLL_SHARE: Final = 0.125
"""... or after this share of what the newest of them has waited, if that is longer: few frames, little delay."""
MAX_STAGE_COMPILES: Final = 64
"""Grammars that wait to be compiled on a stage. The rows of others wait for a place."""
LATE_ROWS: Final = 32
"""Rows whose grammar was compiled late that one frame samples: as many as a lane has."""
COMPILED_BYTES: Final = 64 * MIB
"""Compiled grammars that a stage keeps for later requests; those of live rows live on beside them."""
COMPILED_LIVE_BYTES: Final = GIB
"""Both together. Beyond it no grammar is compiled, and rows wait until others end."""

# Files and memory
MAX_SAFETENSORS_HEADER_BYTES: Final = 100 * MIB
"""The format's own limit."""
MAX_SLICES: Final = 8
"""Slices of different models that one worker may hold: each has a process of its own."""
MAX_PLANNED_MODELS: Final = 16
"""Models that are placed on the workers at once. More would take long, since sets of them are compared."""
MAX_KEPT: Final = 64
"""Epochs that a load may keep on a worker: those of its slices, and of slices that are about to be loaded."""
MEMORY_MARGIN: Final = 0.05
"""Share of a stage's memory that is kept free for activations and the allocator."""
ACTIVE_LAYERS: Final = 16
"""Layers whose values MLX holds at once, since it runs ahead of the device."""
SCORE_BYTES: Final = 4
"""Bytes of an attention score, where a kernel does not keep scores to itself."""

# Fetching
FETCH_TICK_S: Final = 0.25
"""Interval of a fetch's progress reports."""
MAX_SMALL_FILE_BYTES: Final = 64 * MIB
"""Size of a config or tokenizer file; the largest tokenizers have 35 MB."""
LOAD_STUCK_S: Final = 900.0
"""A load that reports the same for this long has failed. It is CHECK_S, since hashing files shows no progress."""
SAMPLE_BYTES: Final = 4096
"""Bytes of a tensor that are sampled to distinguish two fine-tunes: a page, which a disk reads in any case."""
MAX_SAMPLED_TENSORS: Final = 4096
"""Sampling takes a third of a second on a disk that has not cached them."""

# Placement
REFERENCE_CONTEXT: Final = 2048
"""Context in tokens for reported decode speeds: an ordinary chat."""
REFERENCE_PROMPT: Final = 2048
"""Tokens of the prompt for predicted times to the first token."""
FAR_OFF: Final = 2.0
"""A step that takes this many times more or less than predicted is reported to people."""
MANY_USERS: Final = 8
RELAYED_HOPS: Final = 2
"""A hop through the coordinator counts as two."""
ASSUMED_ROUND_TRIP_S: Final = 0.0006
"""Of a link that was not measured: 0.24 ms of software each way, as measured on loopback, and a switch."""
ASSUMED_LINK_BANDWIDTH: Final = 117e6
"""Of a link that was not measured, in bytes a second: gigabit Ethernet, the slowest port of a wired Mac."""
MAX_VERIFIED: Final = 8
"""Most tokens of one sequence in a step that verifies guesses; beyond it more rows save nothing on any device known."""
BALANCE_SLACK: Final = 0.02
"""How much slower than the best a latency plan may be if it balances its stages better, which helps many users."""
EQUAL_MACS_RATIO: Final = 4 / 3
"""Up to this ratio of their speeds, Macs with equal hardware are cut as equally fast. Their frames differ by as much
where other programs run. If one really is that much slower, an even cut of two makes one user's token 1/7 slower than
the fastest cut, which would leave it a single layer and so make all other users wait for the other one."""
SPEED_NOISE_RATIO: Final = 1.1
"""The same for Macs with other hardware. Measurements of one idle machine repeat within a few percent."""
GUESSED_GAP: Final = 0.01
"""How much slower than the best a plan for guessed tokens may be, so that few limits on its stages are tried."""
MAX_HALVED: Final = 6_000
"""Pairs of (set of workers, next worker) over all limits on the slowest stage that a plan for guessed tokens tries."""
MAX_SEARCH: Final = 2_500
"""Pairs of (set of workers, next worker) up to which every order of every subset is tried: eight different workers.
Beyond that the workers are ordered by speed, and the search is exact for that order."""

PROFILE_TIMEOUT_S: Final = 60.0
"""A worker measures itself in two or three seconds. If it takes this long, it works without a profile."""
KEPT_CORRECTIONS: Final = 32
CORRECTION_BOUND: Final = 4.0
"""Limit of a correction in either direction: beyond it the cause is something else."""
LEARN_SHARE: Final = 0.25
"""How far a correction moves towards what new frames say, on a logarithmic scale: a busy minute is soon forgotten."""
LEARNED_FRAMES: Final = 256
"""Decode frames per stage whose times are kept; their median is the measured time."""
LEAST_FRAMES: Final = 16
"""Fewer frames than this give no report and no correction."""
LEARN_S: Final = 10.0
"""Interval at which workers are told what their frames took."""
LEARN_STEP: Final = 0.02
"""A correction is left alone, and not written to disk again, if new frames differ from it by less than this share."""
PLAN_TIMEOUT_S: Final = 60.0
"""Tracing a large model takes seconds, and so may measuring the links of many workers."""

# Discovery
MAX_ROSTER: Final = 64
"""Workers remembered at once; further announcements are ignored."""
MAX_FRAMES_WAITING: Final = 4096
"""Frames queued for one reader; the scheduler's window keeps it far below."""
DATA_THREADS: Final = 32
"""Streams that one data port serves at once: a feed and a pull on each of two lines, the pulse of each, and those of
ending epochs. Each occupies a thread while it is open, so a further stream would wait forever."""
DESCRIBE_TIMEOUT_S: Final = 3.0
"""A worker that takes longer to describe itself counts as absent for now."""
SETTLE_S: Final = 1.0
"""Without --workers, `serve` continues once nobody new was announced for this long."""
SHUTDOWN_GRACE_S: Final = 0.5
"""Time for calls to tell their clients that their requests have ended, and for the last output of a dead engine."""
MIN_CONTEXT: Final = 8
"""Below this not even the canary fits."""
LOOP_STOP_S: Final = 5.0
"""Time for the engine loop's thread to end: a disk that does not answer must not keep `serve` alive."""
UNLOAD_TIMEOUT_S: Final = 2.0
"""Time for workers to free their slices when a coordinator stops."""
