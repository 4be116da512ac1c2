"""Texts as short unit vectors, the same function on every device and on the server.

    hashed    x_d = signed counts of word 1-2-grams and of 3-5-grams of characters in 2^16 bins
              z_d = l2( P (sign(x_d) (1 + ln |x_d|) * idf) )           P [r, 2^16], of {-1, 0, 1}
    a path    z_d = l2( P' mean of a sentence encoder's last states )   P' only where r is smaller

P is drawn from a seed of the protocol, not of the run: vectors of different parties compare.
idf is fitted on public text or is 1: fitted on private text it would leak its words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor

from ..config_tables import EmbeddingConfig
from ..models.sentences import mean_states
from ..seeding import numpy_rng

PROTOCOL_SEED = 20260
NUM_BINS = 2**16
# Achlioptas: two thirds of the entries may be zero without loss
_DENSITY = 1 / 3
# a document's kind shows in its first lines; hashing all of it costs more and moves little
MAX_CHARACTERS = 1000

_Floats = npt.NDArray[np.float32]
Encoder = Callable[[Sequence[str]], Tensor]


def make_encoder(config: EmbeddingConfig, idf: Tensor | None = None) -> Encoder:
    """texts -> [N, r] float32, rows of length 1 (or 0 for a text without a word).

    idf: [2^16] of `fit_idf`, for embedding.idf = "public"; None otherwise.

    >>> encode = make_encoder(EmbeddingConfig())
    >>> encode(["one text", "another"]).shape
    torch.Size([2, 64])
    """
    width = config.dimensions
    if config.encoder != "hashed":
        return lambda texts: _project(mean_states(config.encoder, texts), width)
    if (config.idf == "public") != (idf is not None):
        raise ValueError("make_encoder: idf must be given for embedding.idf = 'public' alone")
    weights = np.ones(NUM_BINS, np.float32) if idf is None else idf.numpy()
    projection = _projection(NUM_BINS, width)

    def encode(texts: Sequence[str]) -> Tensor:
        features = _hashed(texts)
        features.data = np.sign(features.data) * (1 + np.log(np.abs(features.data)))
        features = features.multiply(weights).tocsr()
        projected = torch.from_numpy(np.asarray(features @ projection, np.float32))
        return torch.nn.functional.normalize(projected, dim=1)

    return encode


def fit_idf(texts: Sequence[str]) -> Tensor:
    """ln((1 + N) / (1 + texts that fill the bin)) + 1 of every bin: [2^16] float32."""
    filled = np.asarray((_hashed(texts) != 0).sum(axis=0)).ravel()
    return torch.from_numpy((np.log((1 + len(texts)) / (1 + filled)) + 1).astype(np.float32))


def _hashed(texts: Sequence[str]) -> Any:
    texts = [text[:MAX_CHARACTERS] for text in texts]
    kinds = (("word", (1, 2)), ("char_wb", (3, 5)))
    words, characters = (
        HashingVectorizer(analyzer=kind, ngram_range=lengths, n_features=NUM_BINS, norm=None)
        for kind, lengths in kinds
    )
    return (words.transform(texts) + characters.transform(texts)).tocsr()


def _projection(rows: int, columns: int) -> _Floats:
    rng = numpy_rng(PROTOCOL_SEED, "projection", rows, columns)
    signs = rng.integers(0, 2, (rows, columns), dtype=np.int8) * 2 - 1
    return (signs * (rng.random((rows, columns), dtype=np.float32) < _DENSITY)).astype(np.float32)


def _project(states: Tensor, width: int) -> Tensor:
    if states.shape[1] < width:
        raise ValueError(
            f"make_encoder: embedding.dimensions must be <= {states.shape[1]} of the encoder, "
            f"got {width}"
        )
    if states.shape[1] > width:
        states = states @ torch.from_numpy(_projection(states.shape[1], width))
    unit: Tensor = torch.nn.functional.normalize(states, dim=1)
    return unit
