"""``macpipe launch CLIENT``: prints a known client's environment for the coordinator, or starts the client in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cluster.cli.options import Cluster, Json, open_folder
from cluster.core.errors import InvalidOption, MacpipeError, ModelNotFound, Unauthenticated, Unreachable
from cluster.core.limits import CONNECT_TIMEOUT_S
from cluster.core.text import is_loopback, parse_address

if TYPE_CHECKING:
    from http.client import HTTPConnection

ADDRESS_VARIABLE: Final = "MACPIPE_HTTP"
DEFAULT_HTTP: Final = "127.0.0.1:8080"
KEY_VARIABLE: Final = "MACPIPE_API_KEY"
ANY_KEY: Final = "macpipe"
"""A placeholder: clients require a key, but without a cluster nothing checks it."""
PATIENCE_S: Final = "3600"
PATIENCE_MS: Final = f"{PATIENCE_S}000"
"""How long a client waits for the next event: reading a long prompt for the first time can take minutes."""
LEAST_CONTEXT: Final = MappingProxyType({"claude": 49_152, "codex": 32_768, "opencode": 32_768, "qwen": 32_768})
"""Tokens of context that a coding agent needs. Claude Code's first prompt has 20,500, more with a small vocabulary, and
it keeps thousands of tokens free to compact."""
ANSWER_S: Final = 10.0
"""The headers of a model that is not loaded may have to be read for an answer."""
SMALL_MODELS: Final = ("claude-haiku-4-5", "claude-3-5-haiku-latest")
"""Names of Claude Code's own small models, for which a cluster may have an alias such as ``claude-haiku-*``."""
AUTHORITIES: Final = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
"""Variables for a CA certificate. The first two replace Python clients' CAs; the last adds to those of Node."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A client's environment and command. ``command`` is empty if the user chooses the program.

    ``settings`` are for a client that reads some from a file alone: ``write_settings`` sets ``settings_variable`` to
    its path.
    """

    environment: Mapping[str, str]
    command: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    settings_variable: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """A served model. ``authority`` is the path of the cluster's CA certificate; empty if HTTPS does not need it.

    ``small`` is the name of a smaller model for a client's minor tasks; "" if the same one does them.
    """

    base: str
    model: str
    context: int
    key: str = ANY_KEY
    authority: str = ""
    small: str = ""

    @property
    def longest_answer(self) -> int:
        """Tokens that a client may ask for, so that three quarters of the context stay for its prompt."""
        return max(1, self.context // 4)

    @property
    def openai(self) -> str:
        return f"{self.base}/v1"


def launch(
    ctx: typer.Context,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="claude, codex, aider or another; see above.")],
    http: Annotated[
        str | None,
        typer.Option(
            metavar="[https://]HOST:PORT",
            help="The coordinator's HTTP address; else MACPIPE_HTTP, else 127.0.0.1:8080.",
        ),
    ] = None,
    cluster: Cluster = None,
    small_model: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="For claude: the model that writes titles and summaries.", show_default="the same one"
        ),
    ] = "",
    run: Annotated[bool, typer.Option("--run", help="Start the client, without needing arguments after --.")] = False,
    json_wanted: Json = False,
) -> None:
    """Print the environment for a client, or start it with -- ARGS.

    In a cluster it passes on the API key in MACPIPE_API_KEY. On the coordinator's Mac it makes a key of its own
    instead, once, and uses that again.

    Clients: claude, codex, aider, goose, opencode, qwen. Use openai, anthropic or ollama for programs built
    with those SDKs. `eval "$(macpipe launch claude)"` sets the variables in a shell.
    """
    if client not in CLIENTS:
        raise InvalidOption(f"unknown client {client}; choose one of {', '.join(CLIENTS)}", field="client")
    address = http or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_HTTP
    if small_model and client != "claude":
        raise InvalidOption(f"--small-model is for claude; {client} has one model", field="small_model")
    served = fetch_with_key(address, os.environ.get(KEY_VARIABLE, ""), cluster)
    if small_model:
        require_model(served, small_model, find_authority(cluster))
        served = replace(served, small=small_model)
    elif client == "claude":
        served = replace(served, small=find_small_model(served, find_authority(cluster)))
    if warning := short_context(client, served):
        typer.echo(warning, err=True)
    found = write_settings(add_authority(CLIENTS[client], served), client)
    if run or ctx.args:
        start(found, client, ctx.args)
    elif json_wanted:
        typer.echo(json.dumps({"environment": dict(found.environment), "command": list(found.command)}))
    else:
        typer.echo(shell_lines(found))


def short_context(client: str, served: Served) -> str:
    """Return a warning if the served context is too short for the client's own prompt; empty if it is not."""
    least = LEAST_CONTEXT.get(client, 0)
    if served.context >= least:
        return ""
    return (
        f"{client} needs a context of {least} tokens, and the model is served with {served.context}; "
        f"serve it with --max-context {least} or more"
    )


def fetch_with_key(address: str, key: str, cluster: str | None) -> Served:
    """Ask the coordinator for the served model, with ``key`` or, where that is empty, with this Mac's own if it leads.

    The own key is sent to this Mac only. Raise the errors of ``fetch_served`` and ``ensure_launch_key``.
    """
    try:
        return fetch_served(address, key, find_authority(cluster))
    except Unauthenticated:
        from cluster.security.launch_key import ensure_launch_key

        folder = open_folder(None, cluster)
        if key or not folder.holds_authority or not is_own_address(address):
            raise
        return fetch_served(address, ensure_launch_key(folder), find_authority(cluster))


def is_own_address(given: str) -> bool:
    """Return whether an HTTP address is this machine's own loopback address."""
    host, _ = parse_address(_without_scheme(given))
    return is_loopback(host)


def _without_scheme(given: str) -> str:
    return given.removeprefix("https://").removeprefix("http://")


def find_authority(cluster: str | None) -> Path | None:
    """Return the path of the cluster's CA certificate, or None if this machine has no such cluster."""
    folder = open_folder(None, cluster)
    return folder.authority if folder.exists else None


def fetch_served(given: str, key: str = "", authority: Path | None = None) -> Served:
    """Ask the coordinator for the default model, which need not be loaded if a request would load it.

    Raise Unreachable, Unauthenticated, or MacpipeError if it has none.
    """
    secure = given.startswith("https://")
    address = _without_scheme(given)
    base = f"{'https' if secure else 'http'}://{address}"
    ca_path = str(authority) if secure and authority else ""
    served = Served(base, "", 0, key, ca_path)
    try:
        _, facts = _fetch(served, "/health", authority)
    except _Unreadable as error:
        raise Unreachable(
            f"no coordinator answers HTTP at {given} ({error}); start one with `macpipe serve MODEL`, or name it with "
            "--http"
        ) from error
    if facts.keys() == {"status"}:
        raise Unauthenticated(f"the coordinator at {given} requires an API key: set {KEY_VARIABLE} to a valid one")
    if "model" in facts and "context_length" not in facts:
        facts = {**facts, **(_describe_model(served, facts["model"], authority) or {})}
    if "context_length" not in facts:
        raise MacpipeError(str(facts.get("message", f"the server at {given} is not a coordinator")))
    return Served(base, str(facts["model"]), int(facts["context_length"]), key or ANY_KEY, ca_path)


def require_model(served: Served, name: str, authority: Path | None = None) -> None:
    """Raise ModelNotFound if the coordinator has no model of this name, with the names that it has."""
    status, body = _fetch_model(served, name, authority)
    if status != 200:
        raise ModelNotFound(str(body.get("error", {}).get("message", f"no model {name[:64]}")), field="small_model")


def find_small_model(served: Served, authority: Path | None = None) -> str:
    """Return the model that the cluster serves under the name of a small one of Anthropic's.

    Return "" if there is none, or if it is the default model.
    """
    found = (_describe_model(served, name, authority) for name in SMALL_MODELS)
    name = next((str(body["id"]) for body in found if body and "id" in body), "")
    return "" if name == served.model else name


def _describe_model(served: Served, name: str, authority: Path | None) -> dict[str, Any] | None:
    """Return what the coordinator says of a model; None if it has no model of this name."""
    status, body = _fetch_model(served, name, authority)
    return body if status == 200 else None


def _fetch_model(served: Served, name: str, authority: Path | None) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of a model's route. Raise Unreachable."""
    from urllib.parse import quote

    try:
        return _fetch(served, f"/v1/models/{quote(name, safe='/')}", authority)
    except _Unreadable as error:
        raise Unreachable(f"{served.base} does not tell of its models ({error}); try again") from error


def _fetch(served: Served, path: str, authority: Path | None) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON of a route. Raise ``_Unreadable``."""
    from http.client import HTTPException

    connection = _connection(_without_scheme(served.base), served.base.startswith("https://"), authority)
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_S)
        connection.request("GET", path, headers={"authorization": f"Bearer {served.key}"} if served.key else {})
        reply = connection.getresponse()
        body: dict[str, Any] = json.loads(reply.read(65_536))
    except (OSError, HTTPException, ValueError) as error:
        raise _Unreadable(str(error)[:200] or type(error).__name__) from error
    finally:
        connection.close()
    return reply.status, body


class _Unreadable(Exception):
    """A route does not answer, or not in JSON."""


def _connection(address: str, secure: bool, authority: Path | None) -> HTTPConnection:
    from http.client import HTTPConnection, HTTPSConnection

    host, port = parse_address(address)
    if not secure:
        return HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
    from ssl import create_default_context

    context = create_default_context()
    if authority:
        context.load_verify_locations(authority)
    return HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT_S, context=context)


def add_authority(client: Callable[[Served], Launch], served: Served) -> Launch:
    """Return the client's launch, with the variables that make it trust the cluster's CA."""
    found = client(served)
    trusted = dict.fromkeys(AUTHORITIES if served.authority else (), served.authority)
    return replace(found, environment={**found.environment, **trusted})


def write_settings(found: Launch, client: str) -> Launch:
    """Write the client's settings to a file in the state folder, and name it in the environment.

    Raise MacpipeError if it cannot be written.
    """
    if not found.settings:
        return found
    from cluster.platform.json_file import write_json
    from cluster.platform.paths import state_home
    from cluster.platform.private_files import not_written

    path = state_home() / "launch" / f"{client}.json"
    try:
        write_json(path, dict(found.settings))
    except OSError as error:
        raise not_written(error, path, f"the settings of {client}") from error
    return replace(found, environment={**found.environment, found.settings_variable: str(path)})


def shell_lines(found: Launch) -> str:
    """Return ``export`` lines for a shell."""
    from shlex import join, quote

    lines = [f"export {name}={quote(value)}" for name, value in found.environment.items()]
    return "\n".join([*lines, f"# then: {join(found.command)}"] if found.command else lines)


def start(found: Launch, client: str, arguments: list[str]) -> None:
    """Replace this process with the client. Raise MacpipeError if it is not installed."""
    command = [*(found.command or arguments[:1]), *(arguments if found.command else arguments[1:])]
    if not command:
        raise InvalidOption(f"{client} is not a program; give a command after --", field="client")
    try:
        os.execvpe(command[0], command, {**os.environ, **found.environment})  # noqa: S606  # the user's own program
    except FileNotFoundError:
        raise MacpipeError(f"{command[0]} is not installed, or not on the PATH") from None


def _openai(s: Served) -> dict[str, str]:
    return {"OPENAI_BASE_URL": s.openai, "OPENAI_API_KEY": s.key}


def _claude(s: Served) -> Launch:
    models = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL")
    small = ("DEFAULT_HAIKU_MODEL", "SMALL_FAST_MODEL") if s.small else ()
    environment = {
        "ANTHROPIC_BASE_URL": s.base,
        "ANTHROPIC_AUTH_TOKEN": s.key,
        **{f"ANTHROPIC_{name}": s.model for name in models},
        **{f"ANTHROPIC_{name}": s.small for name in small},
        "CLAUDE_CODE_SUBAGENT_MODEL": s.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(s.context),  # it assumes a million, and never compacts
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(s.longest_answer),
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a line that changes the start of every session's prompt
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": PATIENCE_MS,
        "API_TIMEOUT_MS": PATIENCE_MS,
        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return Launch(environment, ("claude",))


def _codex(s: Served) -> Launch:
    """Pass the provider as options: Codex does not read it from the environment."""
    provider = (
        f'{{name="macpipe",base_url="{s.openai}",env_key="{KEY_VARIABLE}",wire_api="responses",'
        f"stream_idle_timeout_ms={PATIENCE_MS}}}"
    )
    options = {
        "model_provider": "macpipe",
        "model_providers.macpipe": provider,
        "model_context_window": str(s.context),
        "model_auto_compact_token_limit": str(s.context - s.longest_answer),
        "web_search": "disabled",
        "features.multi_agent": "false",  # its tools have a type that only OpenAI's server knows
    }
    settings = (part for name, value in options.items() for part in ("-c", f"{name}={value}"))
    return Launch({KEY_VARIABLE: s.key}, ("codex", "-m", s.model, *settings))


def _opencode(s: Served) -> Launch:
    limit = {"context": s.context, "output": s.longest_answer}
    waits = {"headerTimeout": int(PATIENCE_MS), "chunkTimeout": int(PATIENCE_MS), "timeout": False}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "macpipe",
        "options": {"baseURL": s.openai, "apiKey": s.key, **waits},  # some versions end any request after five minutes
        "models": {s.model: {"name": s.model, "limit": limit}},
    }
    config = {"provider": {"macpipe": provider}, "model": f"macpipe/{s.model}"}
    return Launch({"OPENCODE_CONFIG_CONTENT": json.dumps(config)}, ("opencode",))


def _qwen(s: Served) -> Launch:
    environment = {
        **_openai(s),
        "OPENAI_MODEL": s.model,
        "QWEN_CODE_MAX_OUTPUT_TOKENS": str(s.longest_answer),
        "QWEN_CODE_API_TIMEOUT_MS": PATIENCE_MS,
        "QWEN_STREAM_IDLE_TIMEOUT_MS": PATIENCE_MS,
    }
    context = {"model": {"generationConfig": {"contextWindowSize": s.context}}}  # else it assumes 200,000 tokens
    command = ("qwen", "--auth-type", "openai")  # else it may ask how to sign in
    return Launch(environment, command, context, "QWEN_CODE_SYSTEM_SETTINGS_PATH")


def _aider(s: Served) -> Launch:
    """Set what aider derives from a model's data sheet. It has none of this model and warns at each start."""
    environment = {
        "OPENAI_API_BASE": s.openai,
        "OPENAI_API_KEY": s.key,
        "AIDER_TIMEOUT": PATIENCE_S,
        "AIDER_MAX_CHAT_HISTORY_TOKENS": str(min(max(s.context // 16, 1024), 8192)),  # as for models that it knows
        "AIDER_SHOW_MODEL_WARNINGS": "false",
    }
    return Launch(environment, ("aider", "--model", f"openai/{s.model}"))


def _goose(s: Served) -> Launch:
    environment = {
        "GOOSE_PROVIDER": "openai",
        "GOOSE_MODEL": s.model,
        "GOOSE_CONTEXT_LIMIT": str(s.context),
        "OPENAI_HOST": s.base,
        "OPENAI_API_KEY": s.key,
        "OPENAI_TIMEOUT": PATIENCE_S,
    }
    return Launch(environment, ("goose",))


CLIENTS: Final[Mapping[str, Callable[[Served], Launch]]] = MappingProxyType(
    {
        "claude": _claude,
        "codex": _codex,
        "aider": _aider,
        "goose": _goose,
        "opencode": _opencode,
        "qwen": _qwen,
        "openai": lambda s: Launch(_openai(s)),
        "anthropic": lambda s: Launch({"ANTHROPIC_BASE_URL": s.base, "ANTHROPIC_API_KEY": s.key}),
        "ollama": lambda s: Launch({"OLLAMA_HOST": s.base, "OLLAMA_API_KEY": s.key}),
    }
)
