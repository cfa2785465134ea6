"""Reasons for which a row is left out, as the table and left_out.jsonl state them."""

BAD_JSON = "not JSON"
NOT_UTF8 = "not UTF-8"
NOT_AN_OBJECT = "not a JSON object"
UNKNOWN_SHAPE = "unknown shape"
UNKNOWN_ROLE = "unknown role"
NOT_TEXT = "content is not text"
BAD_TOOLS = "tools or tool calls cannot be read"
BAD_IDS = "token ids or mask cannot be read"
NO_SPAN = "no answer found in the formatted text"
ROLES_OUT_OF_ORDER = "roles out of order"
STARTS_WITH_ASSISTANT = "starts with the assistant"
NO_ANSWER = "no answer"
EMPTY_CONTENT = "empty content"
NOTHING_SUPERVISED = "nothing supervised"
TOO_SHORT = "too short"
TOO_LONG = "too long"
REPETITIVE = "repetitive"
CONTROL_CHARACTERS = "control characters"
DUPLICATE = "duplicate"

UNREADABLE = {BAD_JSON, NOT_UTF8, NOT_AN_OBJECT, UNKNOWN_SHAPE}
"""A file most of whose rows have one of these reasons is not the data that the user meant."""


class LeftOut(Exception):
    """A row cannot be used: one of the reasons above, and what was found."""

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason, found)
        self.reason, self.found = reason, found
