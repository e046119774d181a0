"""The one exception of the data pipeline: what is wrong, where, why, and what mends it."""

from ..errors import DataError

__all__ = ["DataError"]
