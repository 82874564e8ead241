"""Examples on the help pages, by command. They are the lines that people copy, so tests parse each of them."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final = {
    "": ("macpipe demo", "macpipe serve mlx-community/Qwen3-32B-4bit"),
    "demo": ("macpipe demo", "macpipe demo --workers 4 -p 'Who are you?'"),
    "init": ("macpipe init", "macpipe init --macs 3 --cluster lab"),
    "join": ("macpipe join mpj1.TOKEN", "macpipe join - --name mac-2 < token.txt"),
    "worker": ("macpipe worker", "macpipe worker --memory-limit 24GiB --prefix-disk 50GiB"),
    "plan": (
        "macpipe plan mlx-community/Qwen3-32B-4bit",
        "macpipe plan mlx-community/Qwen3-32B-4bit --assume m4-pro-48x2,10gbe",
    ),
    "serve": (
        "macpipe serve mlx-community/Qwen3-32B-4bit",
        "macpipe serve mlx-community/Qwen3-32B-4bit --max-context 32768 --kv-bits 8",
    ),
    "pull": (
        "macpipe pull mlx-community/Qwen3-32B-4bit",
        "macpipe pull mlx-community/Qwen3-32B-4bit --layers 0-31",
    ),
    "generate": (
        "macpipe generate -p 'Why is the sky blue?'",
        "macpipe generate -p - --max-tokens 200 --json < notes.txt",
    ),
    "chat": ("macpipe chat", "macpipe chat --system 'Answer in French.'"),
    "embed": ("macpipe embed 'What is a hop?'", "macpipe embed --model Qwen/Qwen3-Embedding-0.6B < texts.txt"),
    "load": (
        "macpipe load mlx-community/Qwen3-32B-4bit",
        "macpipe load mlx-community/Qwen3-32B-4bit --workers 2 --max-context 16384",
    ),
    "convert": (
        "macpipe convert Qwen/Qwen3-32B qwen3-32b-4bit --bits 4",
        "macpipe convert model.gguf model-folder",
    ),
    "lora": (
        "macpipe lora --model mlx-community/Qwen3-8B-4bit --train --data chats",
        "macpipe lora --model mlx-community/Qwen3-8B-4bit --test --data chats",
    ),
    "drain": ("macpipe drain mac-2", "macpipe drain mac-2 --undo"),
    "handover": ("macpipe handover", "macpipe handover mac-2"),
    "status": ("macpipe status", "macpipe status --watch"),
    "trace": ("macpipe trace", "macpipe trace req-1 -o req-1.json"),
    "bench": ("macpipe bench", "macpipe bench --users 1,4,16 --prompt 2000 --tokens 200"),
    "doctor": ("macpipe doctor", "macpipe doctor --cluster"),
    "report": ("macpipe report", "macpipe report bug.zip"),
    "launch": ("macpipe launch codex -- --help", "macpipe launch claude --run"),
    "store list": ("macpipe store list", "macpipe store list --everywhere"),
    "store rm": (
        "macpipe store rm mlx-community/Qwen3-32B-4bit",
        "macpipe store rm mlx-community/Qwen3-32B-4bit --everywhere",
    ),
    "store prune": ("macpipe store prune --unused 30d", "macpipe store prune --keep 200GiB --dry-run"),
    "store quota": ("macpipe store quota 500GiB", "macpipe store quota off"),
    "models list": ("macpipe models list", "macpipe models list --models ~/models.toml --json"),
    "models add": (
        "macpipe models add mlx-community/Qwen3-0.6B-4bit --name small",
        "macpipe models add mlx-community/Qwen3-0.6B-4bit --alias 'claude-haiku-*' --set idle-unload=15m",
    ),
    "models remove": ("macpipe models remove small", "macpipe models remove small --models ~/models.toml"),
    "service install": ("macpipe service install worker", "macpipe service install serve -- --config macpipe.toml"),
    "config show": ("macpipe config show worker", "macpipe config show serve --config macpipe.toml"),
    "token create": ("macpipe token create", "macpipe token create --role client --ttl 2h"),
    "key create": ("macpipe key create amy", "macpipe key create ci --requests-per-minute 60"),
}
