"""What cpu_vs_torch.py compares, at which sizes, and what each figure has to reach."""

VOCABULARY = 4096
LENGTH = 512
BATCH = {"small": 2, "8m": 4, "tiny": 1}
MODES = ("train", "decode")
MODELS = ("llama", "mamba2", "recurrent_gemma", "qwen3_next")
# What each figure has to reach: our tokens/s over theirs.
TARGETS = {
    ("train", "small"): {"llama": 1.0, "mamba2": 8.0, "recurrent_gemma": 6.0},
    ("train", "8m"): {"llama": 1.0, "mamba2": 2.5, "recurrent_gemma": 2.5, "qwen3_next": 1.8},
    ("decode", "small"): {"llama": 3.0, "mamba2": 12.0, "recurrent_gemma": 4.0},
}
