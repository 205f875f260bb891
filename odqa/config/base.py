"""What all recipe models share."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Settings(BaseModel):
    """Base of all recipe models: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GrownSettings(Settings):
    """Settings that got further keys later on: these are not written where they have their defaults.

    So recipes from before there were such keys keep their hashes.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> Any:
        record = serialize(self)
        fields = type(self).model_fields
        return {
            key: value
            for key, value in record.items()
            if key not in self.LATER or getattr(self, key) != fields[key].get_default(call_default_factory=True)
        }
