"""Settings every test runs under."""

from __future__ import annotations

import os

# Tiny tensors gain nothing from threads, and on a busy machine OpenMP's waiting costs much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch

# Triton's kernels run in its interpreter where there is no GPU; it looks when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
