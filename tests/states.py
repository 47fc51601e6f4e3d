"""What rules remember, to be compared."""

from typing import Any


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """Every number of a state: what is kept of tensors under their names."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= {f"{key}/{inner}": number for inner, number in by_name(value).items()}
        elif isinstance(value, list) and "names" in state and key != "names":
            found |= {f"{key}/{name}": number for name, number in zip(state["names"], value, strict=True)}
        elif key != "names":
            found[key] = value
    return found
