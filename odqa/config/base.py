"""What all recipe models share."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all recipe models: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
