"""Cost targets of a model's files and of its input: templates, tokenizers, texts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio

from cluster.api import request_validation
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import MacpipeError
from cluster.core.limits import MAX_PROMPT_BYTES, MAX_SMALL_FILE_BYTES, MIB
from cluster.core.request import ChatMessage, ChatOptions
from cluster.model.tokenizer import load_tokenizer
from cluster.sandbox.sandboxed_tokenizer import SandboxedTokenizer
from cluster.v1 import inference_pb2 as pb
from fuzz.cost.recipe import Recipe, filled
from fuzz.cost.stand_in import LONG_CONTEXT, model_folder, outcome_of, served
from fuzz.cost.target import TAKEN, CostTarget, Entry, job_limit, opening_limit
from fuzz.targets.kept import scratch

CALLER = request_validation.Caller("fuzz", None)
CHAT = [ChatMessage("user", "a" * 30 + "!")]
MAX_TEMPLATE_BYTES = 18 * MIB
MAX_TOKENIZER_BYTES = 24 * MIB


def _texts() -> Entry:
    async def take(text: bytes) -> str:
        try:
            message = pb.GenerateRequest(text=text.decode("utf-8", "replace"))
            await request_validation.generate_request(message, served(), CALLER)
        except MacpipeError as e:
            return outcome_of(e)
        return TAKEN

    served()
    return Entry(take, sandbox=True)


def _of_model(name: str, change: Callable[[Path, bytes], None]) -> Callable[[], Entry]:
    """Return the entry of a model whose file ``name`` is the input: load its tokenizer, then tokenize a short chat."""

    def prepare() -> Entry:
        folder = scratch("model")
        shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        known = served()

        async def take(data: bytes) -> str:
            try:
                change(folder, data)
                text = SandboxedTokenizer(folder)
                await text.open()
                tokenizer = await anyio.to_thread.run_sync(load_tokenizer, folder)
                model_info = ModelInfo(known.shape, tokenizer, known.tensors, known.found, text)
                said = await model_info.text.converse(CHAT, ChatOptions(), None, LONG_CONTEXT)
            except MacpipeError as e:
                return outcome_of(e)
            return TAKEN if said.count <= LONG_CONTEXT else "!! a prompt beyond every bound"

        return Entry(take)

    return prepare


def _template_file(folder: Path, data: bytes) -> None:
    (folder / "chat_template.jinja").write_bytes(data)


def _tokenizer_file(folder: Path, data: bytes) -> None:
    """The input is JSON without its braces: fields of tokenizer.json; ``added_tokens`` come beside those there are."""
    path = folder / "tokenizer.json"
    original = model_folder() / "tokenizer.json"
    whole = original.read_bytes().rstrip().removesuffix(b"}")
    path.write_bytes(whole + b"," + data + b"}" if data else original.read_bytes())


def _grown(first: str, more: str, times: int, shown: str) -> str:
    """Return a template that makes a value larger and larger and prints it."""
    grow = f"{{% for _ in range({times}) %}}{{% set n.a={more} %}}{{% endfor %}}"
    return f"{{% set n=namespace(a={first}) %}}{grow}{{{{ {shown} }}}}"


def _templates() -> Mapping[str, Recipe]:
    return {
        "plain": "{{ messages[0].content }}",
        "long loop": "{% for _ in range(10**9) %}{% endfor %}x",
        "loops": "{% for _ in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
        "power": "{{ 10**10**7 }}",
        "times": "{{ 'a'*10**10 }}",
        "list times": "{% set x=[0]*(10**10) %}x",
        "padding": "{{ '%9999999999d' % 1 }}",
        "centre": "{{ 'a'|center(10**10) }}",
        "doubling": _grown("'a'", "n.a~n.a", 40, "n.a|length"),
        "doubling less": _grown("'a'", "n.a~n.a", 27, "n.a|length"),
        "long prompt": _grown("'a'", "n.a~n.a", 22, "n.a"),
        "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "two recursions": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(30) }}",
        "replacing": "{{ ('a'*1000)|replace('a', 'a'*1000)|replace('a', 'a'*1000)|length }}",
        "sorting": "{{ range(99999)|list|sort|length }}",
        "joining": "{{ (range(99999)|list)|join('a'*9999)|length }}",
        "to JSON": _grown("[0]", "[n.a,n.a]", 25, "n.a|tojson"),
        "printing": _grown("[0]", "[n.a,n.a]", 25, "n.a"),
        "words": "{{ ('a b '*99999)|wordcount }}{{ ('a b '*99999)|wordwrap(1)|length }}",
        "urls": "{{ ('http://a.b/'*9999)|urlize|length }}",
        "tags": "{{ ('<'*99999)|striptags|length }}",
        "long source": ["rep", 1_000_000, "{{ 'a' }}"],
        "deep source": ["cat", "{{ ", ["nest", 5000, "(", "1", ")"], " }}"],
        "many blocks": ["rep", 100_000, "{% if 1 %}{% endif %}"],
        "nested ifs": ["nest", 500, "{% if 1 %}", "x", "{% endif %}"],
        "long name": ["cat", "{{ ", ["rep", 4_000_000, "a"], " }}"],
        "long text": ["rep", MAX_TEMPLATE_BYTES, "a"],
    }


def _tokenizers() -> Mapping[str, Recipe]:
    flags = '"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":false}'
    added, last = f'",{flags},', f'{{"id":100000,"content":"zz",{flags}]'
    replace = '{"type":"Replace","pattern":{"String":"a"},"content":"aaaaaaaaaa"},'
    split = (
        '"pre_tokenizer":{"type":"Split","pattern":{"Regex":"(a+)+$|(x+x+)+y"},"behavior":"Isolated","invert":false}'
    )
    return {
        "plain": "",
        "backtracking": split,
        "added tokens": ["cat", '"added_tokens":[', ["each", 100_000, '{"id":100001,"content":"<z', added], last],
        "a long token": ["cat", '"added_tokens":[{"id":100001,"content":"', ["rep", 20_000_000, "a"], added, last],
        "a long token of blanks": [
            "cat",
            '"added_tokens":[{"id":100001,"content":"',
            ["rep", 1_000_000, " "],
            added,
            last,
        ],
        "growing": ["cat", '"normalizer":{"type":"Sequence","normalizers":[', ["rep", 9, replace], '{"type":"NFC"}]}'],
        "growing a little": [
            "cat",
            '"normalizer":{"type":"Sequence","normalizers":[',
            ["rep", 5, replace],
            '{"type":"NFC"}]}',
        ],
        "prepending": [
            "cat",
            '"normalizer":{"type":"Sequence","normalizers":[',
            ["rep", 2000, ["cat", '{"type":"Prepend","prepend":"', ["rep", 1000, "b"], '"},']],
            '{"type":"NFC"}]}',
        ],
        "many normalizers": [
            "cat",
            '"normalizer":{"type":"Sequence","normalizers":[',
            ["rep", 200_000, '{"type":"NFC"},'],
            '{"type":"NFC"}]}',
        ],
        "nested normalizers": [
            "cat",
            '"normalizer":',
            ["nest", 100, '{"type":"Sequence","normalizers":[', '{"type":"NFC"}', "]}"],
        ],
        "a long post-processor": [
            "cat",
            '"post_processor":{"type":"TemplateProcessing","single":[',
            ["rep", 100_000, '{"Sequence":{"id":"A","type_id":0}},'],
            '{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{}}',
        ],
        "many words": ["cat", '"x":[', ["each", 100_000, '"', '",'], "0]"],
    }


def _spoken() -> Mapping[str, Recipe]:
    most = MAX_PROMPT_BYTES
    made: dict[str, Recipe] = {
        "one letter": ["rep", most, "a"],
        "blanks": ["rep", most, " "],
        "words": ["rep", most // 5, "ab c "],
        "lines": ["rep", most, "\n"],
        "digits": ["rep", most, "9"],
        "accents": ["rep", most, "\u00e9"],
        "emoji": ["rep", most, "\U0001f600"],
        "marks": ["rep", most // 8, "<|user|>"],
        "joined": ["rep", most // 2, "\u200d\u00e9"],
        "combining": ["cat", "a", ["rep", most - 1, "\u0301"]],
        "long ligatures": ["rep", most, "\ufdfa"],
        "alternating": ["rep", most // 2, "ab"],
        "numbers": ["each", 500_000, " ", "x"],
        "quotes": ["rep", most // 2, "'s"],
        "zeros": ["rep", most, "\0"],
    }
    return {name: filled(recipe, most) for name, recipe in made.items()}


JINJA_ATOMS: tuple[Recipe, ...] = (
    *(
        "{% for _ in range(999) %}",
        "{% endfor %}",
        "{{ 'a'*99999 }}",
        "|list",
        "|tojson",
        "|replace('a','aa')",
        "|sort",
        "x",
    ),
    *("{% set n.a=n.a~n.a %}", "{% if 1 %}", "{% endif %}", "{{ 2**9999 }}", "|center(99999)", "{# a #}"),
)
TOKENIZER_ATOMS: tuple[Recipe, ...] = (
    *('{"type":"NFKC"},', '{"type":"Lowercase"},', '{"type":"Replace","pattern":{"Regex":"(a+)+b"},"content":"aaa"},'),
    *(
        '{"type":"Prepend","prepend":"bbb"},',
        '{"type":"StripAccents"},',
        '"normalizer":null,',
        '"decoder":null,',
        '"truncation":null,',
    ),
)


TARGETS = (
    CostTarget(
        "text-encode",
        "4 MiB",
        MAX_PROMPT_BYTES,
        8,
        _texts,
        _spoken,
        ("a", " ", "\u00e9", "\n", "9", "<|user|>", "\u0301"),
        job_limit,
    ),
    CostTarget(
        "model-template",
        "18 MiB of a file's 64",
        MAX_TEMPLATE_BYTES,
        1,
        _of_model("chat_template.jinja", _template_file),
        _templates,
        JINJA_ATOMS,
        opening_limit,
    ),
    CostTarget(
        "model-tokenizer",
        "24 MiB of a file's 64",
        MAX_TOKENIZER_BYTES,
        1,
        _of_model("tokenizer.json", _tokenizer_file),
        _tokenizers,
        TOKENIZER_ATOMS,
        opening_limit,
    ),
)
assert MAX_TOKENIZER_BYTES < MAX_SMALL_FILE_BYTES
