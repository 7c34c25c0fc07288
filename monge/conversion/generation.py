"""Text from a dense or a converted model, greedy or sampled, as it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from monge.conversion.source import quiet


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Let ``model`` go on from ``prompt``.

    Args:
        model, tokenizer: a causal language model of transformers and its tokenizer.
        prompt: the text to go on from, or with ``chat`` what the user says.
        tokens: at most so many new tokens; fewer where the model ends its text.
        temperature: 0 takes the likeliest token (greedy), more samples from softmax(logits / temperature).
        seed: of the sampling.
        chat: put the prompt into the chat template of the tokenizer.
        on_text: is called with every piece of text as soon as it is certain.

    Returns:
        The new text, without the prompt and without special tokens.

    Raises:
        ValueError: an empty prompt, ``tokens`` below 1, a negative temperature, a model that writes no text,
            a prompt longer than its context, or ``chat`` without a template.
    """
    if tokenizer is None or not model.can_generate():
        raise ValueError(f"{type(model).__name__} is no causal language model: it writes no text")
    if tokens < 1 or temperature < 0:
        raise ValueError(
            f"tokens must be at least 1 and temperature not negative, got {tokens}, {temperature}"
        )
    ids_1L = _encode(tokenizer, prompt, chat)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and ids_1L.shape[1] + tokens > context:
        raise ValueError(
            f"the prompt has {ids_1L.shape[1]} tokens, with {tokens} more pass the context of {context}: "
            "shorten the prompt or ask for fewer tokens"
        )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:  # over the whole vocabulary, whatever the checkpoint's generation config says
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    ids_1L = ids_1L.to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.no_grad(), quiet():
        torch.manual_seed(seed)
        out_1M = model.eval().generate(
            ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            max_new_tokens=tokens,
            streamer=None if on_text is None else _streamer(tokenizer, on_text),
            pad_token_id=padding,
            **sampling,
        )
    return tokenizer.decode(out_1M[0, ids_1L.shape[1] :], skip_special_tokens=True)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    if not prompt:
        raise ValueError("the prompt is empty: give the model something to go on from")
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: leave out chat")
    said = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """transformers' own, which holds text back until no later token can change it."""
    from transformers import TextStreamer

    class Caller(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Caller(tokenizer, skip_prompt=True, skip_special_tokens=True)
