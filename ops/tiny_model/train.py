"""Makes the two bundled models: trains the tokenizer and the models, and exports them.

It uses torch and transformers (LlamaForCausalLM), runs on the CPU and needs no network. All randomness comes from SEED.
It writes one folder per model, and `loss.json` beside this file.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

import corpus
import torch
from batches import CONTEXT, END, IGNORED, SPECIALS, BatchMaker, number_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).parent
BUNDLED = HERE.parents[1] / "cluster" / "bundled"
SEED = 20260
VOCABULARY = 768


@dataclass(frozen=True)
class Recipe:
    """The shape of one model, and the length of its training."""

    name: str
    card: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    steps: int
    peak_rate: float
    threads: int
    warmup: int = 100
    weight_decay: float = 0.01


RECIPES = (
    Recipe("faq", "card_faq.md", 8, 128, 128, 4, 2, steps=1200, peak_rate=2e-3, threads=2),
    Recipe("faq-draft", "card_draft.md", 2, 64, 128, 2, 1, steps=1600, peak_rate=5e-3, threads=1),
)


@dataclass(frozen=True)
class Record:
    """The result of one training run."""

    name: str
    parameters: int
    steps: int
    threads: int
    wall_seconds: float
    final_loss: float
    curve: list[tuple[int, float]]


# --- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(entries: tuple[corpus.Entry, ...]) -> Tokenizer:
    """Train a byte-level BPE. Its alphabet has all 256 bytes, so that it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for entry in entries for text in (*entry.questions, entry.answer)]
    tokenizer.train_from_iterator([*texts, *corpus.SYSTEMS], trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers and mlx-lm load it, with its chat template."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=list(SPECIALS[:3]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"),
    )


# --- training ------------------------------------------------------------------------------------


def build(recipe: Recipe, end: int) -> LlamaForCausalLM:
    """Return a new model of the recipe's shape, with random weights from SEED."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate: linear warm-up, then a half cosine down to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def optimizer_of(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices and none for norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens. The head runs only for those positions."""
    wanted = targets[:, 1:] != IGNORED
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[wanted]
    return cross_entropy(model.lm_head(hidden), targets[:, 1:][wanted])


def train(recipe: Recipe, batches: BatchMaker, end: int) -> tuple[LlamaForCausalLM, Record]:
    """Train one model. Its final loss is the mean of the last fiftieth of the steps."""
    make_deterministic(recipe.threads)
    model = build(recipe, end)
    optimizer = optimizer_of(model, recipe)
    losses: list[float] = []
    began = time.monotonic()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        loss = loss_of(model, *batches.batch())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(
                f"{recipe.name} {step + 1:5d} {mean(losses[-100:]):.4f} {time.monotonic() - began:6.0f} s", flush=True
            )
    return model, record(recipe, model, losses, time.monotonic() - began)


def record(recipe: Recipe, model: LlamaForCausalLM, losses: list[float], seconds: float) -> Record:
    """Summarize a run. Each point of the curve is the mean of the last fiftieth of the steps before it."""
    window = max(1, recipe.steps // 50)
    ends = range(window, len(losses) + 1, window)
    curve = [(at, round(mean(losses[at - window : at]), 5)) for at in ends]
    parameters = sum(weight.numel() for weight in model.parameters())
    return Record(recipe.name, parameters, recipe.steps, recipe.threads, round(seconds, 1), curve[-1][1], curve)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def make_deterministic(threads: int) -> None:
    """Make torch deterministic, and flush denormals: memorised text causes many, and CPUs are slow at them."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


# --- export --------------------------------------------------------------------------------------


def export(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, outcome: Record) -> None:
    """Write the folder that mlx-lm and transformers load, with its model card."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=model.config.eos_token_id
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    wrapped(tokenizer).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    card = Template((HERE / recipe.card).read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card.substitute(figures(outcome)), encoding="utf-8")


def figures(outcome: Record) -> dict[str, str]:
    """Return the figures of a model card."""
    return {
        "parameters": f"{outcome.parameters:,}",
        "steps": f"{outcome.steps:,}",
        "seed": str(SEED),
        "threads": "one CPU thread" if outcome.threads == 1 else f"{outcome.threads} CPU threads",
        "loss": f"{outcome.final_loss:.4f}",
        "minutes": f"{outcome.wall_seconds / 60:.0f}",
    }


def write_losses(outcomes: list[Record]) -> None:
    """Write `loss.json`. A model that was not trained in this run keeps its old record."""
    path = HERE / "loss.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    fresh = {outcome.name: asdict(outcome) for outcome in outcomes}
    machine = f"{platform.machine()}, torch {torch.__version__}"
    report = {"seed": SEED, "machine": machine, "models": kept | fresh}
    path.write_text(json.dumps(report) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the bundled models.")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder for the two model folders")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="train just this one")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    entries = corpus.load_entries()
    tokenizer = train_tokenizer(entries)
    end = number_of(tokenizer, END)
    outcomes: list[Record] = []
    for recipe in RECIPES:
        if options.only in (None, recipe.name):
            model, outcome = train(recipe, BatchMaker(tokenizer, entries, SEED), end)
            export(options.out / recipe.name, model, tokenizer, recipe, outcome)
            outcomes.append(outcome)
    write_losses(outcomes)


if __name__ == "__main__":
    main()
