"""A device's embedding: what is near, what is weighed, what is refused."""

from pathlib import Path

import pytest
import torch

from deepfusion.config_tables import EmbeddingConfig
from deepfusion.data import corpora, encoding
from deepfusion.data.documents import Document
from deepfusion.data.encoding import fit_idf, make_encoder
from deepfusion.device.embed import embed
from deepfusion.models import build


def document(text: str, number: int = 0) -> Document:
    return Document(text, f"s{number}", "law", "t")


CLINIC = [document(f"the patient {i} takes a drug against fever in the ward") for i in range(9)]
MARKET = [document(f"the company {i} reports revenue and profit to its auditor") for i in range(9)]


def test_embedding_is_of_length_one_and_blind_to_order() -> None:
    encode = make_encoder(EmbeddingConfig(dimensions=64))
    one, two = embed(CLINIC, encode), embed(CLINIC[::-1], encode)
    assert one.shape == (64,)
    assert one.dtype == torch.float32
    assert torch.allclose(one, two, atol=1e-6)
    assert float(one.norm()) == pytest.approx(1.0, abs=1e-6)


def test_like_text_is_nearer_than_other_text() -> None:
    encode = make_encoder(EmbeddingConfig())
    first, second, other = (embed(d, encode) for d in (CLINIC[:4], CLINIC[4:], MARKET))
    assert first @ second > 0.9
    assert first @ other < 0.5


def test_public_idf_weighs_words_and_is_needed_if_asked_for() -> None:
    asked = EmbeddingConfig(idf="public")
    texts = [one.text for one in CLINIC + MARKET]
    idf = fit_idf(texts)
    assert idf.shape == (encoding.NUM_BINS,)
    assert idf.min() == pytest.approx(1.0)
    plain, weighted = make_encoder(EmbeddingConfig())(texts), make_encoder(asked, idf)(texts)
    assert not torch.allclose(plain, weighted, atol=1e-3)
    ones = torch.ones(encoding.NUM_BINS)
    assert torch.allclose(make_encoder(asked, ones)(texts), plain, atol=1e-6)
    for config, given in ((asked, None), (EmbeddingConfig(), idf)):
        with pytest.raises(ValueError, match="idf must be given for embedding"):
            make_encoder(config, given)


def test_a_shard_without_text_is_refused() -> None:
    encode = make_encoder(EmbeddingConfig())
    with pytest.raises(ValueError, match="documents must be at least one, got none"):
        embed([], encode)
    with pytest.raises(ValueError, match="2 documents must hold words, got none in any"):
        embed([document("  "), document("\n")], encode)


def test_encoder_of_a_path_is_projected(tmp_path: Path) -> None:
    corpora.train_tokenizer([one.text for one in CLINIC], 300).save_pretrained(str(tmp_path))
    build.build("llama", 300, torch.Generator().manual_seed(0), 64).save_pretrained(str(tmp_path))
    encode = make_encoder(EmbeddingConfig(encoder=str(tmp_path), dimensions=16))
    assert encode(["the patient", "the company"]).shape == (2, 16)
    with pytest.raises(ValueError, match="dimensions must be <= 128 of the encoder, got 200"):
        make_encoder(EmbeddingConfig(encoder=str(tmp_path), dimensions=200))(["x"])
