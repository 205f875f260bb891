"""What a training of a retriever leaves (kind "bi-encoder"): a method on a frozen encoder, and what it was trained for.

    method.json, method.safetensors    the method (odqa.frozen.method)
    bi-encoder.json                    the side it is for, the encoder's weights and settings
    curve.json                         loss and tune scores on the way

The side says which texts are encoded with it: questions, whose passages then keep the vectors of the frozen encoder;
passages; or both. An encoder with other weights or other settings is refused: its vectors would mean something else.
This module loads neither torch nor a model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from odqa.artifacts import sha256_file, sha256_json
from odqa.errors import ArtifactError, ArtifactMismatch

KIND = "bi-encoder"
DESCRIPTION = "bi-encoder.json"
FILES = (DESCRIPTION, "method.json", "method.safetensors")

Side = Literal["questions", "passages"]
Sides = Literal["questions", "passages", "both"]

# Settings of an encoder that do not decide what a vector means: names of models (their weights are compared), formats.
_FREE = {"question_model", "passage_model", "dtype", "store_dtype", "prompts"}


@dataclass(frozen=True, slots=True)
class TunedMethod:
    """A trained method in `folder`: the `side` it is for, and the encoder's `weights` (by side) and `settings`.

    `hash` is its identity: sha256 over its files.
    """

    folder: Path
    side: Sides
    weights: Mapping[str, str]
    settings: Mapping[str, Any]
    hash: str

    @classmethod
    def load(cls, folder: Path) -> "TunedMethod":
        """Read the description. Raises ArtifactError for a folder that is no trained bi-encoder."""
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ArtifactError(
                f"{folder}: not a trained bi-encoder ({missing[0]} is missing). Make one with odqa train and a recipe "
                "of kind train-bi-encoder, and name its folder under dense.method."
            )
        told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        digest = sha256_json([sha256_file(folder / name) for name in FILES])
        return cls(folder, told["side"], told["weights"], told["settings"], digest)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that compute with the method."""
        both: tuple[Side, ...] = get_args(Side)
        return both if self.side == "both" else (self.side,)

    def check(self, weights: Mapping[Side, str], settings: Mapping[str, Any]) -> None:
        """Raises ArtifactMismatch for an encoder with other weights on a trained side, or with other settings."""
        for side in self.sides:
            if weights[side] != self.weights[side]:
                raise ArtifactMismatch(
                    f"{self.folder}: trained on an encoder of {side} with weights {self.weights[side][:8]}; this one "
                    f"has {weights[side][:8]}. Use that encoder or train the method again."
                )
        wrong = {key: value for key, value in comparable(settings).items() if value != self.settings.get(key)}
        if wrong:
            told = ", ".join(f"{key} {value!r} instead of {self.settings.get(key)!r}" for key, value in wrong.items())
            raise ArtifactMismatch(
                f"{self.folder}: trained with other settings of the encoder: {told}. Name the same under dense, or "
                "train the method again."
            )


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an encoder that decide what its vectors mean."""
    return {key: value for key, value in settings.items() if key not in _FREE}


def save_description(folder: Path, side: Sides, weights: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Write bi-encoder.json: `weights` are the fingerprints of both sides' models, `settings` all of the encoder's."""
    told = {"side": side, "weights": dict(weights), "settings": comparable(settings)}
    (folder / DESCRIPTION).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")
