"""Tools and their calls in OpenAI's form, as chat templates take them: arguments are objects, not text."""

import json
from typing import Any

from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.reasons import LeftOut


def read_tools(value: Any) -> list[dict[str, Any]]:
    """``[{"type": "function", "function": {...}}]`` of a list of schemas, or of its JSON.

    Raises:
        LeftOut: it is none.
    """
    listed = _from_json(value) if value else []
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list) or not all(_function(tool).get("name") for tool in listed):
        raise LeftOut(reasons.BAD_TOOLS, f"{value!r:.80}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]


def read_calls(value: Any) -> list[dict[str, Any]]:
    """``[{"type": "function", "function": {"name", "arguments"}}]`` of one call or several, or of their JSON.

    Raises:
        LeftOut: it is none.
    """
    calls = _from_json(value)
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any) -> dict[str, Any]:
    function = _function(call)
    arguments = _from_json(function.get("arguments", function.get("parameters", {})) or {})
    if not function.get("name") or not isinstance(arguments, dict):
        raise LeftOut(reasons.BAD_TOOLS, f"{call!r:.80}")
    identity = {"id": call["id"]} if call.get("id") else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _function(value: Any) -> dict[str, Any]:
    inner = value.get("function", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        raise LeftOut(reasons.BAD_TOOLS, f"{value!r:.80}") from None
