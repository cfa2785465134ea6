"""The typed schema of every config group and recipe.

A field's documentation is the string below it; ``docs/configuration.md`` is generated from these files.  Contradictions
inside a group are rejected in its ``__post_init__``, those between groups in the recipe's; derived numbers are methods.
"""

from nemo_speculative.config.schema.checkpoint import *
from nemo_speculative.config.schema.common import *
from nemo_speculative.config.schema.data import *
from nemo_speculative.config.schema.draft import *
from nemo_speculative.config.schema.target import *
from nemo_speculative.config.schema.training import *
