"""The reference's loss cases as tensors: five of them are in the repository, the others need the fixtures folder."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from yolocore.assign import Assignment, assign_targets
from yolocore.hyperparameters import Hyperparameters
from yolocore.loss import LossWeights

SMALL = Path(__file__).parent.parent / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((SMALL / "loss_cases.json").read_text())


@dataclass
class LossCase:
    info: dict[str, Any]
    arrays: Any

    @property
    def predictions(self) -> list[Tensor]:
        """Fresh leaves [1, B, A, H, W, 5+C]."""
        return [torch.from_numpy(self.arrays[f"pred_{i}"].copy())[None].requires_grad_() for i in range(3)]

    def assignment(self, padding: int = 32) -> Assignment:
        grids = [self.arrays[f"pred_{i}"].shape[2:4] for i in range(3)]
        return assign_targets(
            padded(torch.from_numpy(self.arrays["targets"]), padding),
            grids,
            torch.from_numpy(self.arrays["anchors"]),
            self.info["bs"],
            self.info["raw_hyp"]["anchor_t"],
        )

    @property
    def hyperparameters(self) -> Hyperparameters:
        return Hyperparameters.from_mapping(self.info["raw_hyp"], "golden")

    @property
    def weights(self) -> LossWeights:
        return LossWeights.from_hyperparameters(
            self.hyperparameters,
            self.info["nc"],
            self.info["imgsz_for_gain"],
            label_smoothing=self.info["label_smoothing"],
        )


def padded(targets: Tensor, multiple: int) -> Tensor:
    """Rows up to the next multiple, at least one multiple, with image -1."""
    rows = max(-(-len(targets) // multiple), 1) * multiple
    result = torch.zeros(rows, 6, dtype=targets.dtype)
    result[:, 0] = -1
    result[: len(targets)] = targets
    return result


def load_case(name: str) -> LossCase:
    path = SMALL / f"loss_{name}.npz"
    if not path.exists():
        folder = os.environ.get("YOLOSEARCH_FIXTURES")
        if not folder:
            pytest.skip("YOLOSEARCH_FIXTURES is not set")
        path = Path(folder) / "golden" / path.name
    with np.load(path, allow_pickle=False) as arrays:
        return LossCase(CASES[name], dict(arrays))
