# fcos_tiny.yaml as a Python config (LazyConfig): FRS, with the weights that its authors released
# for FCOS.
from ..baselines.fcos_tiny_lazy import dataloader, lr_multiplier, model, optimizer, train

distill = dict(
    METHODS=["FRS"],
    TEACHER=dict(
        CONFIG="shapes/baselines/fcos_tiny_teacher.yaml", WEIGHTS="d2kd://fcos_tiny_teacher.pth"
    ),
    FRS=dict(
        FEATURE=dict(WEIGHT=0.01, WARMUP_ITERS=100),
        CLS=dict(WEIGHT=0.05, WARMUP_ITERS=100),
    ),
)
