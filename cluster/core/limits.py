"""Every bound, size and deadline, each with its reason. Nothing else in the tree invents a number of this kind."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# Sizes on the wire
MAX_FRAME_BYTES: Final = 256 * MIB
"""A prefill chunk of 2,048 tokens x 16,384 wide in bf16 is 64 MiB; three boundary tensors of that fit with room."""
MAX_FRAME_HEADER_BYTES: Final = 4 * MIB
"""Token ids of the longest chunk, edits and timings: 2,048 ids are 8 KiB; the rest is small."""
BULK_BYTES: Final = 64 * KIB
"""Tensors of a prefill frame above this travel on the line for bulk; below, two messages cost more than they save."""
MAX_TENSORS: Final = 16
"""Boundary values are one to three arrays in every architecture that mlx-lm has."""
MAX_TENSOR_RANK: Final = 8
MAX_STAGES: Final = 64
MAX_BODIES_WAITING: Final = 2 * MAX_STAGES
"""Bodies on the line for bulk that are ahead of their heads; the prefill window (stages + 1) keeps it below."""
MAX_WAITING_BYTES: Final = GIB
"""Frames in one queue of the data plane together. A reader that is so far behind is lost, and its memory matters more:
the window of 64 stages with chunks of 16 MiB is as much."""
MAX_JOINED_BYTES: Final = 2 * MIB
"""Grammars that the joins of one frame carry, half of a header; one alone may be as long as it may be."""
MAX_HEADER_ELEMENTS: Final = 64 * KIB
"""Values in a frame's header, those of lists within lists included: 4 MiB of empty lists take 1.5 s and 300 MiB. The
sequences of a lane with all alternatives have 17,000."""
MAX_JOINED_ELEMENTS: Final = MAX_HEADER_ELEMENTS // 2
"""Values that the joins of one frame carry: biases of eleven requests that have as many as they may."""
MAX_MARK_TOKENS: Final = 64
"""Of the mark that ends a model's reasoning; the longest known has five."""
MAX_EDITS: Final = 4096
"""One frame may free every sequence and prefix there is."""
MAX_ROWS: Final = 256
"""Sequences in one lane."""
MAX_CONTROL_BYTES: Final = 16 * MIB
"""Control and public messages: the longest prompt in four-byte characters."""
MAX_FACT_CHARS: Final = 256
"""A name, a version or a chip, as a worker tells them of itself."""
MAX_PATH_CHARS: Final = 4096
"""A model's name or folder, as a coordinator tells it to a worker; the longest path that systems take."""
MAX_SENTENCE_CHARS: Final = 4096
"""Of a worker's problem, which is shown to people."""
MAX_ANSWER_BYTES: Final = 256 * KIB
"""What a worker may answer its coordinator at once; a heartbeat's answer has 4 KiB. In empty messages it is parsed in
5 ms, where 16 MiB kept everybody from the event loop for 1.5 s."""
MAX_STORE_ANSWER_BYTES: Final = 2 * MIB
"""What a store may answer at once: PEER_CHUNK_BYTES of a file, or MAX_MODEL_FILES names."""
MAX_ENGINE_MESSAGE_BYTES: Final = MIB
"""Between a daemon and its engine: paths and an error's sentence are the longest there is."""

# What a request may ask for
MAX_PROMPT_CHARS: Final = 4 * MIB
"""A context of a million tokens, about."""
MAX_MESSAGES: Final = 4096
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_LOGIT_BIAS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
LEAST_REPETITION_PENALTY: Final = 0.01
"""Logits are divided by it: next to zero they would be no numbers any more. Nobody asks for less than a half."""
MOST_REPETITION_PENALTY: Final = 10.0
MAX_REQUEST_ID_CHARS: Final = 128
MAX_SAMPLES: Final = 32
"""Answers of one prompt in one request: what one lane can decode together."""
MAX_TOOLS: Final = 256
MAX_TOOL_NAME_CHARS: Final = 128
MAX_TEMPLATE_CHARS: Final = 64 * KIB
"""Further arguments of a chat template, as JSON."""
MAX_SCHEMA_BYTES: Final = 64 * KIB
"""A JSON schema, regex or Lark grammar, unless --max-schema-bytes is given; also the tools' parameters together."""
MOST_SCHEMA_BYTES: Final = MIB
"""What --max-schema-bytes may be: a join with such a grammar still leaves a frame's header room for the rest."""
BLAME_TIMEOUT_S: Final = 5.0
"""To find which of a request's tools makes its grammar impossible, each compiled by itself."""
MAX_INTAKE_BYTES: Final = 96 * MIB
"""Bytes of all requests under way, arrived or still arriving; one client gets at most half of it."""
FREE_BODY_BYTES: Final = 64 * KIB
"""The start of each body is not charged, so that ordinary requests pass while large ones fill the budget; with
``MAX_CONNECTIONS`` of them that is 128 MiB."""
SMALL_REQUEST_BYTES: Final = 8 * KIB
"""A request or a piece of one up to this is counted, parsed and checked on the event loop: a millisecond or two. With
more, 300 at once would keep the loop from taking up further calls, which gRPC cancels after 30 s."""
MAX_PARSING_WAITING: Final = 256
"""Requests that wait for the thread that parses; one more is refused with RESOURCE_EXHAUSTED. Each takes
10 to 50 ms."""
MAX_PROMPT_IDS: Final = MIB
"""A prompt that is given as token ids."""
MAX_FIELDS: Final = 32 * KIB
"""Fields of one gRPC request, those of its submessages included: 4,096 messages with a call each have 32,000."""
MAX_STAGE_FIELDS: Final = 320 * KIB
"""The same of a request to load a stage, which names its tensors: as many as fit a message, at 50 bytes each."""
MAX_STAGE_PEERS: Final = 256
"""Macs that a stage's bytes may be had from; each is dialled. A coordinator names the workers that it knows."""
DEFAULT_MAX_TOKENS: Final = 512
DEFAULT_MAX_CONTEXT: Final = 4096
"""Promised when --max-context is not given and the model allows as much."""

# Scheduling
PREFILL_CHUNK: Final = 512
"""Tokens a prefill frame carries: long enough for matrix-matrix speed, short enough to overlap stages."""
MAX_PRIORITY: Final = 9
MAX_QUEUE: Final = 256
"""Requests that wait; one more is refused with RESOURCE_EXHAUSTED."""
RETRY_AFTER_S: Final = 2.0
UNAVAILABLE_S: Final = 5.0
"""When to come back to what cannot be had now and does not say for how long: a load or a recovery takes seconds."""
MAX_UNREAD_EVENTS: Final = 1024
"""Token events a client may leave unread, beside what gRPC buffers, before its request is dropped as a slow reader."""
LANE_ROWS: Final = 32
"""Sequences that one lane decodes together at most; more would make everyone's next token wait longer."""
MAX_PREFIXES: Final = 1024
"""Kept prefixes, however small: dropping them all still fits the edits of one frame."""
PREFIX_SHARE: Final = 0.5
"""Share of a stage's cache memory that kept prefixes may take, as long as no live sequence needs it."""
MAX_STEP_MS: Final = 100.0
"""What one prefill chunk may take of a stage while others wait for their next token, unless --max-step-ms is given:
what a person just notices, and four times what reading a stage's weights takes, which each chunk has to."""
OCCUPANCY_S: Final = 30.0
"""Over how long bubble shares are told."""

# Deadlines, in seconds
DISCOVERY_TIMEOUT_S: Final = 30.0
"""`serve` waits this long for its workers before it says who is missing."""
CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_TIMEOUT_S: Final = 2.0
"""The same for a data stream to where another one just fell silent. Over a link of 100 ms it takes half of that."""
CONTROL_TIMEOUT_S: Final = 10.0
"""A control call that moves no weights."""
LOAD_STALL_S: Final = 120.0
"""A load that reports no progress for this long has failed."""
FRAME_TIMEOUT_S: Final = 120.0
"""A frame may take this long while nothing is known of the stages' speed: kernels are compiled first."""
FRAME_FLOOR_S: Final = 15.0
"""No frame is overdue sooner, however fast the ones before were: a Mac that swaps or is busy is slow, not dead."""
FRAME_SLACK: Final = 10.0
"""A frame may take so many times as long as the slowest of late."""
CANARY_TIMEOUT_S: Final = 120.0
"""The first token compiles kernels (42 s on one CUDA machine)."""
HEARTBEAT_S: Final = 0.5
"""How often a coordinator asks its workers how they are, which also tells them that it is there."""
SUSPECT_S: Final = 1.25
"""Silence after which a worker is suspect: two heartbeats that were not answered."""
GONE_S: Final = 2.5
"""Silence after which a worker is gone. An answer takes 0.1 s over a slow link, so this is no link's doing."""
ASK_S: Final = 2 * GONE_S
"""How long a recovery waits for answers: after GONE_S of silence a worker is gone, the rest is for a busy machine."""
STATUS_ASK_S: Final = 1.0
"""How long `status` waits for answers; then it shows what was known before. People and monitors ask all the time."""
STATUS_VIEW_S: Final = 0.5
"""How long `status` waits for the engine loop's figures, which take a millisecond unless it is stuck."""
REMEMBER_S: Final = 600.0
"""How long `status` shows a worker that has left."""
MAX_DEPARTED: Final = 16
"""Workers that have left and are shown still; the longest gone is forgotten first."""
MOVE_S: Final = 3600.0
"""How long a drain waits for its layers to be loaded elsewhere: 300 GB at 1 Gb/s. A load that stalls ends sooner."""
HOLD_S: Final = 6.0
"""A worker whose coordinator has not been heard for this long may be taken by another."""
ENGINE_SILENCE_S: Final = 10.0
"""An engine that does not even say what it holds for this long is killed and started again."""
RETURN_S: Final = 5.0
"""How long recovery waits for a crashed engine before it turns to a spare: one that stood by is there at once, one
that has to be started takes one or two."""
RECOVERY_WAIT_S: Final = 20.0
"""How long requests wait where too few Macs are left, for one to come back, before they end with an error."""
ENGINE_STEADY_S: Final = 5.0
"""An engine that has lived this long is started again at once: it does not crash in a loop."""
STANDBY_AFTER_S: Final = 2.0
"""After a worker's start, or after its standby was needed, the next one is started: what loads now goes first."""
ENGINE_CRASHES: Final = 3
CRASHES_S: Final = 60.0
"""A worker that was lost so often in so short a time is not waited for: a spare takes over at once."""
JOURNAL_BYTES: Final = 16 * MIB
"""A journal this long is written anew without what has ended; one full of live requests takes no more of them."""
JOURNAL_FSYNC_S: Final = 1.0
RESTART_S: Final = GONE_S
"""A coordinator that has been silent for this long has ended: another of its id is the same one, started again."""
JOURNAL_RETRY_S: Final = 5.0
"""A journal that could not be written is tried again this often."""
JOURNAL_LIVE_S: Final = 10.0
"""How often a journal notes which requests are live, from when on RESUME_S counts."""
RESUME_S: Final = 600.0
"""How long a client of a coordinator that died may take to come back for the rest of its answer."""
EPOCH_TRIES: Final = 4
"""Loads that are tried with a larger epoch each, where workers hold newer ones than this coordinator knew of."""
ADOPTION_LOOKS: Final = 5
"""How often a coordinator that was started again looks for the rest of the workers that hold its model."""
STEADY_S: Final = 3.0
"""A worker that is back counts as back for good after this long."""
DRAIN_RETRY_S: Final = 5.0
"""Between two looks whether the layers of a worker that wants to leave can go elsewhere."""
MAX_REPLAYS: Final = 8
"""A request that loses so many rings without a token in between ends: it may be what kills them."""
RECOVERY_TRIES: Final = 8
"""A recovery that has failed so often, and for that long, ends what waits for it; it goes on trying without."""
RECOVERY_PAUSE_S: Final = 0.1
"""Between two tries at a recovery, which ask everybody anew; an engine that stood by is there after as long."""
DRAIN_S: Final = 15.0
"""What a worker that was told to stop gives its coordinator to move its layers away, or its requests to end."""
REPORT_TIMEOUT_S: Final = 2.0
"""An engine reports at once, also while it computes. Below DESCRIBE_TIMEOUT_S, so that its daemon can say so."""
STOP_GRACE_S: Final = 1.5
"""What an engine gets to end by itself before it is killed, inside the daemon's three seconds."""
ENGINE_START_TIMEOUT_S: Final = 60.0
ENGINE_BACKOFF_S: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits between restarts of an engine that keeps dying; the last one repeats."""

# Overload: a slow machine is not a dead one
LAG_TICK_S: Final = 0.25
"""How often a process measures how late its timers fire."""
LAG_WINDOW_S: Final = 15.0
"""Over how long; a busy machine is late again and again."""
LAG_FLOOR_S: Final = 0.05
"""Timers that fire later than this are late; on a machine that is not overloaded they are not."""
MAX_LAG_S: Final = 5.0
"""A machine that slept for an hour was not an hour late."""
LAG_STEPS: Final = 8
"""Wake-ups of threads and processes on the way of a question and its answer, each of which may be late."""
OVERLOADED_S: Final = 0.25
"""A lag above this is shown to people, and an engine is not judged by its silence meanwhile."""
SLOW_ANSWERS: Final = 8
SLOW_ANSWER_S: Final = 60.0
"""How long a slow answer is remembered, ..."""
FALSE_ALARM_S: Final = 300.0
"""... and a silence that was none: recoveries on an overloaded machine take a minute each."""
PATIENCE_GROWTH: Final = 4.0
"""By what each further false alarm multiplies a deadline: every one costs a recovery, so few must do."""
MAX_PATIENCE: Final = 16.0
"""The most that experience multiplies a deadline by."""
SILENT_BUSY_SHARE: Final = 0.1
"""An engine that is silent but computes counts as hung after ten times ENGINE_SILENCE_S."""

# gRPC keepalive: the bound on pings is what makes a stopped peer noticed in two seconds instead of a minute.
KEEPALIVE_MS: Final = 500
KEEPALIVE_TIMEOUT_MS: Final = 1_500
CLIENT_KEEPALIVE_MS: Final = 2_000
CLIENT_KEEPALIVE_TIMEOUT_MS: Final = 10_000
"""Between clients and the coordinator: a Mac that is busy for seconds is no reason to give up an answer."""
BULK_KEEPALIVE_MS: Final = 10_000
BULK_TIMEOUT_MS: Final = 60_000
"""Where megabytes travel, a ping waits behind them: 8 MiB take 7 s at 10 Mbit/s. A pulse beside them sees cuts."""
RECONNECT_MS: Final = 1_000
"""A worker that is back is tried again this soon; gRPC's own pauses grow to two minutes."""
CONNECT_ATTEMPT_MS: Final = 3_000
"""One try to connect: a cut network swallows it, and gRPC would wait for 20 s."""
CONTROL_IDLE_MS: Final = 600_000
"""A gRPC connection on which nothing is called for this long is closed; clients open another when they need it."""
MAX_CALLS: Final = 1024
"""Calls at once on one gRPC connection: as many as may wait and run, several times."""

# HTTP
MAX_BODY_BYTES: Final = 16 * MIB
"""As long as a gRPC message may be."""
FREE_CHUNKS: Final = 256
"""Chunks of a body that may be of any length; ..."""
MIN_CHUNK_BYTES: Final = 256
"""... beyond them, the mean length of its chunks. Clients send kilobytes; 16 MiB are 65,000 chunks at most."""
BODY_TIMEOUT_S: Final = 30.0
"""What a client gets to send its request's body."""
MAX_PROMPTS: Final = 64
"""Prompts in one completions request."""
MAX_ANSWERS: Final = 64
"""Answers that one request may ask for, over all its prompts."""
STREAM_WRITE_TIMEOUT_S: Final = 30.0
"""A client whose connection takes no more bytes for this long has gone away."""
STREAM_COMMENT_S: Final = 5.0
"""A stream with nothing to say says so this often: proxies and clients drop silent ones, after 10 s the hastiest."""
IDLE_CONNECTION_S: Final = 75.0
"""How long a connection may wait for its next request; above what SDKs keep one in their pools."""
HEADER_TIMEOUT_S: Final = 10.0
"""What a client gets to send a request's head, or to shake hands; after that its connection is closed."""
LINGER_S: Final = 2.0
"""What was refused before it was read may go on coming for this long, so that the refusal arrives; ..."""
CLOSE_S: Final = 5.0
"""... and a connection whose client takes no bytes is cut so long after it was to be closed."""
PREFLIGHT_S: Final = 600.0
"""How long a browser may remember that a page may ask."""
KEY_LOOK_S: Final = 1.0
"""How often it is looked whether keys with answers under way were revoked; new requests are refused at once."""
MAX_CONNECTIONS: Final = 2048
"""Open HTTP connections; more than requests can wait, and fewer than ``OPEN_FILES``."""
MAX_PEERS: Final = 1024
"""Open connections of one gRPC port, those that have not shaken hands among them; whoever comes then is turned away."""
HANDSHAKE_S: Final = 10.0
"""What whoever connects to a gRPC port gets to shake hands; 120 s is gRPC's own."""
OPEN_FILES: Final = 8192
"""What a daemon asks the system for: all of its ports full, and its files. macOS gives 256 to who does not ask."""
MAX_TOLD_TOKENS: Final = 262_144
"""Tokens of a text of which each is told by itself: to write them all out is work for one client alone."""
JOIN_RETRY_S: Final = 2.0
"""How soon a port for joining is tried again that another program of this Mac uses, such as ``macpipe init``."""

# Sandbox processes: tokenizing, rendering chat templates and compiling grammars (cluster/sandbox)
SANDBOX_PROCESSES: Final = 2
"""Processes for text, and as many for grammars: a schema that keeps its process busy delays no prompt."""
SANDBOX_CPU_S: Final = 0.5
"""CPU time of one job. Ordinary prompts and schemas need 1 to 50 ms."""
SANDBOX_CPU_S_PER_MIB: Final = 2.0
"""More of it for a MiB of text: tokenizers take 0.5 to 0.7 s."""
SANDBOX_MEMORY_BYTES: Final = 256 * MIB
"""Memory that one job may take beyond what its process holds."""
SANDBOX_MEMORY_PER_BYTE: Final = 384
"""More of it for a byte of text. Nearly each byte of random printable text is a token, which takes 360 bytes while they
are found: 1.3 GiB for 4 MiB."""
SANDBOX_WALL_FACTOR: Final = 20.0
"""A job may take so many times its CPU time where others keep the processors busy; then the machine is overloaded."""
SANDBOX_OPEN_CPU_S: Final = 30.0
"""To load a tokenizer and prepare it for grammars: the largest take 5 s."""
SANDBOX_OPEN_MEMORY_BYTES: Final = 3 * GIB
"""The same in memory: the largest take 1 GiB."""
SANDBOX_OPEN_WALL_S: Final = 120.0
SANDBOX_WARM_UP_CPU_S: Final = 5.0
"""To compile a chat template and render one message: the largest that is taken takes 2.2 s."""
LARGE_PROMPT_BYTES: Final = 256 * KIB
"""A larger prompt is tokenized in a process for large ones, one at a time: it takes half a second or more."""
MAX_SANDBOX_WAITING: Final = 256
"""Jobs that wait for a process; one more is refused with RESOURCE_EXHAUSTED."""
SANDBOX_WAIT_S: Final = 30.0
"""How long a job waits for a process before it is refused the same way."""
SANDBOX_GROW_S: Final = 0.25
"""How long a job waits before a further process is started: starting one takes a second of CPU."""
MEMORY_WATCH_S: Final = 0.1
"""Between two looks at the memory of a process with a job: short jobs end before the first."""
MAX_SANDBOX_MESSAGE_BYTES: Final = 64 * MIB
"""The longest prompt as text, or its tokens as text one by one."""
MAX_RENDERED_CHARS: Final = 2 * MAX_PROMPT_CHARS
"""What a chat template may make of the longest conversation."""

# Tokenizers, before they are loaded. The largest known have 262,144 tokens, 7,000 of them added.
MAX_VOCABULARY: Final = 2_000_000
MAX_ADDED_TOKENS: Final = 32_768
"""Loading takes time that grows with their square: 400,000 take 87 s."""
MAX_TOKEN_CHARS: Final = 4096
"""Of one token. The longest known are 256 blanks."""
MAX_CHAT_TEMPLATE_CHARS: Final = 512 * KIB
"""The largest known have 60 KiB."""

# Grammars on the last stage
MASK_LEXER_FUEL: Final = 50_000
"""llguidance's unit of work of the lexer for one token: 4 ms."""
MASK_PARSER_ITEMS: Final = 10_000
"""The same of the parser, for regular expressions and Lark. With the library's 50,000, one token can take 350 ms of
everybody's on a stage."""
MASK_ROW_ITEMS: Final = 2_000
"""The parser's items after one byte, likewise. An ambiguous grammar costs up to the cube of it: 60 ms for one token at
2,000, over a second at 10,000."""
JSON_PARSER_ITEMS: Final = 100_000
"""The parser's items for one token of a JSON schema. What follows a comma is one of all optional properties that are
left, four items each, once for each token of blanks and a quote: 2,000 properties need 50,000 to 100,000."""
JSON_ROW_ITEMS: Final = 10_000
"""The same after one byte: 2,400 optional properties. A schema is not ambiguous about where a value ends, so a row
costs no more than its square: 2,000 properties take 15 to 40 ms for the token before a name, 2.5 ms on average."""
WALK_TOKENS: Final = 24
"""How far a check follows a grammar, twice: grammars that are too ambiguous show it within 20 tokens."""
WALK_CPU_S: Final = 0.2
"""CPU time that those tokens may take: 4 ms for each. The rest of ``SANDBOX_CPU_S`` is for compiling."""
GRAMMAR_WAIT_S: Final = 5.0
"""How long a stage waits for a grammar at its first token: ten times what compiling may cost, and well below
``ENGINE_SILENCE_S``."""
MAX_STAGE_COMPILES: Final = 64
"""Grammars that wait to be compiled on a stage, or are kept compiled."""

# Files and memory
MAX_SAFETENSORS_HEADER_BYTES: Final = 100 * MIB
"""The format's own limit."""
MEMORY_MARGIN: Final = 0.05
"""Share of a stage's memory kept free beside weights and caches, for activations and the allocator."""

# Fetching
FETCH_STREAMS: Final = 4
"""Ranges that one Mac fetches at once: enough to fill a home's line, few enough for the hub's limits."""
FETCH_RANGE_BYTES: Final = 64 * MIB
"""Neighbouring tensors are asked for together up to this; a longer tensor is asked for alone."""
FETCH_COMMIT_BYTES: Final = 8 * MIB
"""What a kill may cost: ranges are noted in pieces of this size, ..."""
FETCH_COMMIT_S: Final = 1.0
"""... or what came in this time, where that is less."""
FETCH_ATTEMPTS: Final = 5
"""Tries of one range at one source that bring no byte."""
FETCH_BACKOFF_S: Final = 0.5
"""Wait before the second try; doubled for each further one."""
FETCH_TICK_S: Final = 0.25
"""How often a fetch tells how far it is."""
HUB_TIMEOUT_S: Final = 10.0
"""The hub says nothing for this long: a try has failed, and another begins."""
HUB_PEEK_BYTES: Final = 64 * KIB
"""First range of a large file: most headers are shorter."""
MAX_SMALL_FILE_BYTES: Final = 64 * MIB
"""Config and tokenizer files; the largest tokenizers have 35 MB."""
MAX_MODEL_FILES: Final = 4096
"""In one model; the largest have a few hundred."""
MAX_MODEL_BYTES: Final = 8 * 1024 * GIB
"""Of all files of one model together; holes of that size are still within what file systems take."""
MAX_MODEL_READ_BYTES: Final = GIB
"""Small files and headers of one model together, which are read before anything is known of it."""
DEFER_S: Final = 15.0
"""How long a worker waits for one that should be fetching a tensor for both, and does not say that it is."""
LOAD_STUCK_S: Final = 900.0
"""A load that says the same all the time has failed after this long, which is CHECK_S: hashing files shows nothing."""
CHECK_S: Final = 900.0
"""How long a worker waits for one that hashes its files anew: half a terabyte, off an ordinary SSD."""
MAX_NOTICES: Final = 8
"""Sentences about one load's bytes: a person reads no more, and the log has all."""
PEER_CHUNK_BYTES: Final = 1 * MIB
PEER_CALL_TIMEOUT_S: Final = 300.0
"""One call for FETCH_RANGE_BYTES from a peer: 2 Mbit/s at least."""
SHELF_READERS: Final = 8
"""Calls for bytes that one Mac answers at once; further ones are told to come back."""
MAX_TENSORS_NAMED: Final = 4096
"""Tensors in one message about tensors: under 1 MiB."""
MAX_CHECKPOINT_TENSORS: Final = 1_000_000
SAMPLE_BYTES: Final = 4096
"""Of a tensor, to tell two fine-tunes apart: a page, which is what a disk reads anyway; not every number changes."""
MAX_SAMPLED_TENSORS: Final = 4096
"""A third of a second on a disk that has not read them before."""
HASH_THREADS: Final = 2
"""A core hashes 1 to 2 GB/s; the disk is the next limit."""
DISK_MARGIN_BYTES: Final = 512 * MIB
"""A disk that is quite full makes a Mac unusable."""
# Placement
REFERENCE_CONTEXT: Final = 2048
"""Tokens of context at which a decode speed is told: an ordinary chat."""
REFERENCE_PROMPT: Final = 2048
"""Tokens of the prompt whose first token is foretold."""
FAR_OFF: Final = 2.0
"""A step that takes more than this times what was predicted, or less than a part of it, is told to people."""
MANY_USERS: Final = 8
RELAYED_HOPS: Final = 2
"""A hop by way of the coordinator is two."""
ASSUMED_ROUND_TRIP_S: Final = 0.0006
"""Of a link that was not measured: 0.24 ms of software each way, as measured on loopback, and a switch."""
ASSUMED_LINK_BANDWIDTH: Final = 117e6
"""Of a link that was not measured, in bytes a second: gigabit Ethernet, the least that a wired Mac has."""
BALANCE_SLACK: Final = 0.02
"""By how much a plan for latency may be slower than the best if that evens out its stages: many users gain by it."""
MAX_SEARCH: Final = 2_500
"""Pairs of (set of workers, next worker) up to which every order of every subset is tried: eight different workers.
Beyond that the order is by speed, and the search is exact in that order."""

PROFILE_TIMEOUT_S: Final = 60.0
"""A worker measures itself in two or three seconds; one that takes this long works without a profile."""
KEPT_CORRECTIONS: Final = 32
KEPT_LINKS: Final = 64
CORRECTION_BOUND: Final = 8.0
"""A correction beyond this, either way, says that something else is wrong."""
LEARNED_FRAMES: Final = 256
"""Decode frames, a stage, whose times are remembered: their median is what was measured."""
LEAST_FRAMES: Final = 16
"""Below this nothing is said of what frames take, and nothing learned."""
LEARN_S: Final = 10.0
"""How often workers are told what their frames took."""
LEARN_STEP: Final = 0.02
"""A ratio that moved by less than this is not written to disk again."""
PLAN_TIMEOUT_S: Final = 60.0
"""Tracing a large model takes seconds, and so may the links of many workers."""
PROBES: Final = 12
"""Empty messages by which a link's round trip is told."""
PROBE_BYTES: Final = MIB
PROBE_MESSAGES: Final = 8
"""By which its bandwidth is: 8 MiB are 70 ms at 1 Gb/s."""
PROBE_TIMEOUT_S: Final = 5.0
LINK_KEPT_S: Final = 24 * 3600.0
"""A link that was measured within a day is not measured again before a load."""

# Discovery
MAX_ROSTER: Final = 64
"""Workers remembered at once; further announcements are ignored."""
MAX_FRAMES_WAITING: Final = 4096
"""Frames queued towards one reader; the scheduler's window keeps it far below."""
DATA_THREADS: Final = 32
"""Streams that one data port serves at once: a feed and a pull on each of two lines, the pulse of each, and those of
epochs that are ending. Each holds a thread while it is open, so one more would wait for ever."""
DESCRIBE_TIMEOUT_S: Final = 3.0
"""A worker that takes longer to say who it is counts as absent for now."""
SETTLE_S: Final = 1.0
"""Without --workers, `serve` goes ahead once nobody new was announced for this long."""
LAST_WORDS_S: Final = 0.5
"""What calls get, once their requests have ended, to tell their clients so."""
MIN_CONTEXT: Final = 8
"""Below this not even the canary fits."""
LOOP_STOP_S: Final = 5.0
"""What the engine loop's thread gets to end: a disk that does not answer must not keep `serve` alive."""
FAREWELL_S: Final = 2.0
"""What workers get to free their slices when a coordinator stops."""
