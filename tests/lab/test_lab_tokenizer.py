"""The lab's tokenizer: deterministic, lossless, blind to validation text; windows that cover it once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monge.lab.tokenizer import END_OF_TEXT, load_corpus, load_tokenizer, train_tokenizer
from monge.workspace.text import find_domains

TEXTS = ["the quiet river runs over the stone, " * 50, "every hill is warm under the sun. " * 50]


def test_the_same_text_gives_the_same_tokenizer():
    first, second = (train_tokenizer(TEXTS, 300).to_str() for _ in range(2))
    assert first == second


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_every_text_survives_encoding(text):
    tokenizer = train_tokenizer(TEXTS, 280)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_validation_text_does_not_reach_the_tokenizer(tmp_path, make_config):
    for path in sorted((tmp_path / "text").glob("*.txt"))[9::10]:
        path.write_text("xylophone " * 400)
    config = make_config()
    corpus = load_corpus(find_domains(config.text), config)
    assert corpus.domains[0]["val_files"] == ["09.txt"]
    vocabulary = corpus.tokenizer.get_vocab()
    assert any(len(token) > 3 for token in vocabulary if token != END_OF_TEXT)
    assert not any("xy" in token for token in vocabulary)


def test_windows_cover_the_tokens_once_and_overlap_by_their_target(tmp_path, make_config):
    config = make_config(steps=7, batch=3)
    corpus = load_corpus(find_domains(config.text), config)
    train_NS = corpus.train_NS
    assert train_NS.shape[1] == config.context + 1
    assert torch.equal(train_NS[:-1, -1], train_NS[1:, 0])
    # the budget, give or take the rounding of every file and its end of text
    assert abs(train_NS[:, 1:].numel() - config.tokens) <= 11 + config.context
    assert corpus.domains[0]["train_tokens"] - train_NS[:, 1:].numel() <= config.context
    assert int(train_NS.max()) < config.vocab


def test_reuse_gives_the_same_tokens_and_new_text_another_digest(tmp_path, make_config):
    config = make_config()
    first = load_corpus(find_domains(config.text), config)
    first.tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved = load_tokenizer(tmp_path / "tokenizer.json")
    again = load_corpus(find_domains(config.text), config, saved)
    assert first.digest == again.digest
    assert torch.equal(first.val_NS, again.val_NS)
    (tmp_path / "text" / "00.txt").write_text("sun " * 600)
    assert load_corpus(find_domains(config.text), config, saved).digest != first.digest


def test_text_shorter_than_a_sequence_is_refused(tmp_path, make_config):
    (tmp_path / "short.txt").write_text("a few words only")
    config = make_config(text=(str(tmp_path / "short.txt"),))
    with pytest.raises(ValueError, match=r"text has .* tokens, fewer than two sequences of 16"):
        load_corpus(find_domains(config.text), config)


def test_a_damaged_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer .*Delete it"):
        load_tokenizer(path)
