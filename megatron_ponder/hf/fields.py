"""Reading a foreign config.json so that nothing in it is passed over: what nobody asks for is refused by name."""

from collections.abc import Collection

from megatron_ponder.base.errors import UserError

# Larger than any size or number of steps that a model has, and small enough for every product of two to be a number.
LARGEST = 10**9
# The largest number of fp32, of a power of ten.
LARGEST_NUMBER = 1e38


class Fields:
    """The fields of a config.json, each of which has to be asked for by its name and type.

    A field that is null counts as absent, as it does for transformers.

    Args:
        content: what the file holds.
        where: its name, for messages.
    """

    def __init__(self, content: dict, where: str = "config.json") -> None:
        self._content, self._where = content, where
        self._known: set[str] = set()

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to `LARGEST`; without a default the field must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self.wrong(name, f"a whole number from {least} to {LARGEST:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; without a default the field must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:
            raise self.wrong(name, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false; without a default the field must be there."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, *allowed: str) -> str:
        """One of these words; the field must be there."""
        value = self._value(name, None)
        if value not in allowed:
            raise self.wrong(name, f"one of {', '.join(allowed)}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty if it is absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of texts")
        return value

    def anything(self, name: str) -> object:
        """Whatever the field holds; None if it is absent."""
        return self._value(name, None)

    def missing(self, name: str) -> bool:
        """Whether the file does not mention a field at all, as null either."""
        return name not in self._content

    def part(self, name: str) -> "Fields":
        """The fields of an object inside the file; none if it is absent."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{name} in {self._where}")

    def only(self, name: str, *allowed: object) -> object:
        """What the field holds, the first of these if it is absent; anything but these is refused."""
        value = self._value(name, allowed[0])
        if not any(type(value) is type(right) and value == right for right in allowed):
            raise self.foreign(name)
        return value

    def harmless(self, names: Collection[str]) -> None:
        """Let fields hold anything, because nothing that the model computes depends on them."""
        self._known.update(names)

    def end(self) -> None:
        """Refuse the first field that nobody has asked for.

        Raises:
            UserError: naming it.
        """
        for name in sorted(self._content.keys() - self._known):
            if self._given(name):
                raise UserError(
                    f"{name} {_short(self._content[name])} in {self._where} is not known here, and may change what the "
                    "model computes; if you know that it does not, remove it from the file"
                )

    def wrong(self, name: str, right: str) -> UserError:
        """The error for a field that does not hold what it should."""
        if not self._given(name):
            return UserError(f"{self._where} lacks {name}; download the model's own config.json again")
        return UserError(
            f"{name} in {self._where} is {_short(self._content[name])}, which is not {right}; download the model's own "
            "config.json again"
        )

    def foreign(self, name: str) -> UserError:
        """The error for a field that asks for what PonderLM does not have."""
        return UserError(
            f"{name} {_short(self._content.get(name))} in {self._where} is something PonderLM does not have; convert "
            "another model"
        )

    def _given(self, name: str) -> bool:
        return self._content.get(name) is not None

    def _value(self, name: str, default: object) -> object:
        self._known.add(name)
        return self._content[name] if self._given(name) else default


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
