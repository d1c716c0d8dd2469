"""Why did it miss? Recorded requests in, the places where their prefix breaks out (`anaphora lint`).

`read` takes JSON Lines apart, `lint` finds, `repair` mends what can be mended safely and says what that gains. Everything here
is pure: values in, values out; files and terminals are the command's.
"""

from anaphora.lint.findings import RULES, Finding
from anaphora.lint.linting import Options, Report, lint
from anaphora.lint.requests import BadInput, Recorded, read

__all__ = ["RULES", "BadInput", "Finding", "Options", "Recorded", "Report", "lint", "read"]
